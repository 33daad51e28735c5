"""Names of the package are imported when they are asked for, and are what they would be otherwise."""

import ast
import inspect
import multiprocessing
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import reroute_fx


def imports_for_type_checkers():
    """Home of each name that type checkers and editors see."""
    (block,) = (node for node in ast.parse(inspect.getsource(reroute_fx)).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}


def test_python_and_type_checkers_see_the_same_names():
    homes = imports_for_type_checkers()
    assert sorted(homes) == reroute_fx.__all__
    assert {name for name, home in homes.items() if home is None} == {"kernels", "passes"}
    assert {name: home for name, home in homes.items() if home} == reroute_fx._HOMES
    for name, home in homes.items():
        expected = (
            getattr(import_module(f"reroute_fx.{home}"), name) if home else sys.modules[f"reroute_fx.{name}"]
        )
        assert getattr(reroute_fx, name) is expected
    assert dir(reroute_fx) == sorted([*reroute_fx.__all__, "__version__"])


@pytest.fixture(scope="module")
def fresh():
    """A function that runs code in a process that has imported torch and transformers, and nothing of the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "transformers.exporters.exporter_dynamo"])

    def run(code):
        process = context.Process(target=exec, args=(BARE + code, {}))
        process.start()
        process.join()
        assert process.exitcode == 0, code

    return run


BARE = "import sys; assert not [name for name in sys.modules if name.startswith('reroute_fx')]\n"


def test_importing_the_package_imports_nothing_that_takes_time():
    code = (
        "import sys, reroute_fx\n"
        "dir(reroute_fx), reroute_fx.__version__, hasattr(reroute_fx, 'prune')\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich', 'fcntl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "code",
    [
        "import reroute_fx.passes; reroute_fx.passes.FindLayers",
        "import reroute_fx; reroute_fx.passes.FindLayers; reroute_fx.kernels.select_tokens",
        "from reroute_fx import *; assert compile.__module__ == 'reroute_fx.api'",
        "import reroute_fx; reroute_fx.artifact.ArtifactReport; reroute_fx.visualizing.check_visualize",
        "import reroute_fx; reroute_fx.visualize; reroute_fx.visualizing.visualize",
        "import reroute_fx.artifact; assert reroute_fx.export is reroute_fx.artifact.export",
        "import reroute_fx.kernels, torch; torch.ops.reroute.select_tokens.default",
        "from reroute_fx import load; import torch; torch.ops.reroute.compact_tokens.default",
    ],
)
def test_ways_to_import(fresh, code):
    """Each in a process that has not imported the package."""
    fresh(code)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'reroute_fx' has no attribute 'prune'"):
        _ = reroute_fx.prune
    with pytest.raises(ImportError, match="cannot import name 'prune'"):
        exec("from reroute_fx import prune")


def test_what_was_pickled_is_read_where_nothing_was_imported(fresh, tmp_path):
    config = reroute_fx.RoutingConfig.from_tier(128)
    path = Path(tmp_path, "config")
    path.write_bytes(pickle.dumps(config))
    fresh(
        f"import pickle; config = pickle.loads(open({str(path)!r}, 'rb').read())\n"
        f"assert repr(config) == {repr(config)!r}"
    )
