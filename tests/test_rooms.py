"""The package is a house: imports run from floor to floor downwards, none in a circle, and no name stands twice."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {"reroute_fx": "reroute_fx", "reroute_fx.passes": "passes", "reroute_fx.kernels": "kernels"}

# From top to bottom. Rooms of one floor know nothing of each other; the package itself is the front door to all below.
FLOORS = (
    ("command_line",),
    ("reroute_fx",),
    ("benchmarking", "evals", "serving", "tuning"),
    ("api", "artifact"),
    ("runtime",),
    ("pipeline", "lowering", "visualizing"),
    ("analysis", "selection", "loading"),
    ("capture",),
    ("config",),
    ("methods",),
    ("rules",),
    ("common", "grounding", "_compat"),
    ("errors",),
    ("passes",),
    ("kernels",),
)
SAME_IN_EACH_FOLDER = {"__init__", "conftest"}
OF_EACH_KERNEL = {"triton", "reference"}


def modules(root):
    """File of each module of the package, by its full name."""
    found = {}
    for package, folder in PLACES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def imports(root):
    """What each module of the package imports of it, at the top, in functions and for type checkers."""
    files = modules(root)
    found = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = _source(node, module if path.name == "__init__.py" else module.rpartition(".")[0])
                # What a package gives is a module of it or a name that it has itself.
                names |= {
                    name if (name := f"{source}.{alias.name}") in files else source for alias in node.names
                }
        found[module] = {name for name in names if name.partition(".")[0] == "reroute_fx"}
    return found


def _source(node, package):
    """Full name of what an import takes its names from."""
    above = package.rsplit(".", node.level - 1)[0] if node.level else ""
    return ".".join(part for part in (above, node.module) if part)


def room(module):
    return module.split(".")[:2][-1]


def upward(found, floors=FLOORS):
    """Imports that do not run downwards, as text."""
    floor = {name: number for number, names in enumerate(floors) for name in names}
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        for name in sorted(names)
        if room(module) != room(name) and floor[room(module)] >= floor[room(name)]
    ]


def circle(found):
    """Modules that import each other in a circle, if there are any."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def twice(paths):
    """Names that more than one module has, with the places."""
    found = defaultdict(list)
    for path in paths:
        of_a_kernel = path.stem in OF_EACH_KERNEL and "kernels" in path.parts
        if path.stem not in SAME_IN_EACH_FOLDER and not of_a_kernel:
            found[path.stem].append(path.as_posix())
    return {name: places for name, places in found.items() if len(places) > 1}


def test_no_import_runs_upwards():
    found = imports(ROOT)
    assert {room(module) for module in found} == {name for names in FLOORS for name in names}
    assert upward(found) == []


def test_no_imports_in_a_circle():
    assert circle(imports(ROOT)) == []


def test_no_two_modules_of_one_name():
    folders = ("reroute_fx", "passes", "kernels", "benchmarks", "tests")
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 200
    assert twice(paths) == {}


def build(root, sources):
    """Imports of a tree of these files."""
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return imports(root)


@pytest.mark.parametrize(
    "source",
    [
        "from reroute_fx import api",
        "from reroute_fx.api import compile",
        "import reroute_fx.api",
        "from .. import api",
        "from ..api import compile",
        "def later():\n    from ..api import compile",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import api",
    ],
)
def test_an_import_that_runs_upwards_is_found(tmp_path, source):
    downwards = (
        "import torch\nfrom . import passes\nfrom .config.limits import Limits\nfrom .kernels import keep"
    )
    files = {"reroute_fx/api.py": downwards, "reroute_fx/config/limits.py": source}
    found = build(tmp_path, files | {"passes/__init__.py": "", "kernels/__init__.py": ""})
    assert upward(found) == ["reroute_fx.config.limits imports reroute_fx.api"]
    assert sorted(set(circle(found))) == ["reroute_fx.api", "reroute_fx.config.limits"]


def test_an_import_from_a_room_of_the_same_floor_or_from_passes_is_found(tmp_path):
    files = {
        "reroute_fx/lowering/regions.py": "from ..pipeline import route",
        "reroute_fx/pipeline.py": "from .passes.replay import replay",
        "passes/replay.py": "from .. import errors",
        "reroute_fx/errors.py": "",
    }
    found = build(tmp_path, files)
    assert upward(found) == [
        "reroute_fx.lowering.regions imports reroute_fx.pipeline",
        "reroute_fx.passes.replay imports reroute_fx.errors",
    ]
    assert circle(found) == []


def test_a_circle_within_a_room_is_found(tmp_path):
    files = {"reroute_fx/runtime/__init__.py": "from .rows import Rows", "reroute_fx/runtime/rows.py": ""}
    assert circle(build(tmp_path, files)) == []
    found = build(tmp_path, files | {"reroute_fx/runtime/rows.py": "from . import Rows"})
    assert upward(found) == []
    assert sorted(set(circle(found))) == ["reroute_fx.runtime", "reroute_fx.runtime.rows"]


def test_a_name_that_stands_twice_is_found():
    names = ["passes/memory.py", "reroute_fx/runtime/memory.py", "passes/triton.py", "kernels/a/triton.py"]
    names += ["kernels/b/triton.py", "kernels/b/__init__.py", "kernels/a/__init__.py", "tests/conftest.py"]
    assert twice(map(Path, names)) == {"memory": ["passes/memory.py", "reroute_fx/runtime/memory.py"]}
    assert twice(map(Path, [*names, "benchmarks/triton.py"])).keys() == {"memory", "triton"}
