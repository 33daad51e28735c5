r"""Record which operators a release of Torch-TensorRT converts, from its sources, without importing it.

pip download torch-tensorrt==2.13.0 --no-deps --dest wheel && unzip -d wheel wheel/*.whl
python benchmarks/record_converters.py wheel/torch_tensorrt \
    reroute_fx/lowering/tensorrt/data/torch_tensorrt_converters.json
"""

import argparse
import ast
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

DECORATOR = "dynamo_tensorrt_converter"
GROUPS = "dynamo/lowering/_decomposition_groups.py"
DECOMPOSITIONS = "dynamo/lowering/_decompositions.py"


def record(package: Path, today: str) -> dict[str, Any]:
    """What an unpacked torch_tensorrt package registers.

    Args:
        package: its folder.
        today: date to write down.

    Raises:
        SystemExit: the folder is no torch_tensorrt package, or registers no converter.
    """
    if not (package / "dynamo").is_dir():
        raise SystemExit(f"{package} has no folder dynamo; expected an unpacked torch_tensorrt package.")
    converters = [
        entry
        for path in sorted((package / "dynamo").rglob("*.py"))
        for entry in _converters(_parse(path), path.relative_to(package).as_posix())
    ]
    if not converters:
        raise SystemExit(
            f"{package} registers no converter with @{DECORATOR}; expected a release from 2.0 on."
        )
    return {
        "source": "sources in the wheel torch_tensorrt on pypi.org",
        "version": _version(package),
        "recorded": today,
        "converters": converters,
        "decompositions": {
            "torch": _set(package / GROUPS, "torch_enabled_decompositions"),
            "kept": _set(package / GROUPS, "torch_disabled_decompositions"),
            "own": sorted(set(_own_decompositions(package / DECOMPOSITIONS))),
        },
    }


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _version(package: Path) -> str:
    for node in ast.walk(_parse(package / "_version.py")):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit(f"{package / '_version.py'} sets no __version__; expected the one of a release.")


def _converters(module: ast.Module, file: str) -> Iterator[dict[str, Any]]:
    """One entry for each decorator of a function, in the order of the file."""
    for condition, function in _functions(module.body, ()):
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(DECORATOR):
                given = {k.arg: k.value for k in decorator.keywords}
                yield {
                    "target": _name(decorator.args[0]),
                    "supports_dynamic_shapes": _flag(given, "supports_dynamic_shapes"),
                    "requires_output_allocator": _flag(given, "requires_output_allocator"),
                    "validator": _text(given.get("capability_validator")),
                    "only_if": " and ".join(condition),
                    "file": file,
                }


def _functions(
    body: list[ast.stmt], condition: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """Functions of a module, also those that are defined under a condition, with that condition."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield condition, node
        elif isinstance(node, ast.If):
            test = ast.unparse(node.test)
            yield from _functions(node.body, (*condition, test))
            yield from _functions(node.orelse, (*condition, f"not {test}"))
        elif isinstance(node, ast.Try):
            yield from _functions([*node.body, *node.orelse], (*condition, "its imports work"))


def _flag(given: dict[str | None, ast.expr], name: str) -> bool:
    return bool(ast.literal_eval(given[name])) if name in given else False


def _text(node: ast.expr | None) -> str:
    """A validator on one line; empty for none."""
    return "" if node is None or ast.unparse(node) == "None" else ast.unparse(node)


def _name(node: ast.expr) -> str:
    """A target as torch prints it: ``aten.add.Tensor``, ``operator.add``."""
    return ast.unparse(node).removeprefix("torch.ops.")


def _set(path: Path, variable: str) -> list[str]:
    """Elements of a set that a module assigns to `variable`."""
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Set):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == variable:
                return sorted(_name(element) for element in node.value.elts)
    raise SystemExit(
        f"{path} assigns no set to {variable}; expected the one that Torch-TensorRT decomposes by."
    )


def _own_decompositions(path: Path) -> Iterator[str]:
    """First arguments of `register_torch_trt_decomposition` and `replace_inplace_op`."""
    for node in ast.walk(_parse(path)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("register_torch_trt_decomposition", "replace_inplace_op"):
            name = _name(node.args[0])  # type: ignore[attr-defined]
            if "." in name:
                yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of an unpacked torch_tensorrt package")
    parser.add_argument("output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    recorded = record(arguments.package, date.today().isoformat())
    arguments.output.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"{len(recorded['converters'])} converters of torch_tensorrt {recorded['version']}")


if __name__ == "__main__":
    main()
