"""Names of tensors: those that artifacts and ONNX files have, read as they are written, and spelt in one place."""

import ast
import re
from pathlib import Path

import pytest

from reroute_fx.passes import tensor_names
from reroute_fx.passes.tensor_names import is_cache_input, output_name, read_output_name

ROOT = Path(__file__).parents[2]
NAMES = {
    "keep_input": "keep_7",
    "slots_input": "slots_7",
    "positions_input": "position_ids_7",
    "cached_input": "cached_7",
    "capacity_size": "capacity_7",
}
OUTPUTS = ("key", "value", "scores", "kept", "stream")


@pytest.mark.parametrize("function", NAMES)
def test_names_of_a_layer(function):
    assert getattr(tensor_names, function)(7) == NAMES[function]
    assert not is_cache_input(NAMES[function])


def test_names_of_caches():
    names = [tensor_names.cache_input(kind, 12) for kind in tensor_names.CACHED]
    assert names == ["key_cache_12", "value_cache_12"]
    assert all(map(is_cache_input, names))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_read_as_they_are_written(kind):
    assert output_name(kind, 31) == f"{kind}.31"
    assert read_output_name(f"{kind}.31") == (kind, 31)


def spelt(source):
    """Texts of a module, docstrings aside, that begin as a name of a tensor with a number."""
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
    ]
    inputs = r"(keep|slots|cached|capacity|position_ids|(key|value)?_cache)_(\d|$)"
    return [text for text in texts if re.match(rf"({inputs}|({'|'.join(OUTPUTS)})\.(\d|$))", text)]


def test_no_other_module_spells_them():
    paths = [path for folder in ("passes", "reroute_fx") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: names for path in paths if (names := spelt(path.read_text()))}
    assert found.pop("tensor_names.py")
    assert found == {}


def test_a_module_that_spells_them_is_found():
    source = 'def f(i):\n    "key.3"\n    return f"keep_{i}", f"key.{i}", "slots_3", f"{i}_cache_{i}", "keep_ratios"'
    assert sorted(spelt(source)) == ["_cache_", "keep_", "key.", "slots_3"]
