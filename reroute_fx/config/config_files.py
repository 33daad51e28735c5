"""Configurations as JSON: the form in which artifacts hold them, read without trusting it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..errors import ConfigError
from ..rules import RULES

Kind = TypeVar("Kind")


def to_plain(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain numbers, strings, lists and dictionaries."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def from_plain(kind: type[Kind], content: Mapping[str, Any]) -> Kind:
    """What `to_plain` was given; fields with defaults may be missing.

    Raises:
        ConfigError: naming the first field that is missing, unknown or wrong.
    """
    try:
        text = json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"config can't be written as JSON: {error}; expected plain values.") from error
    return _parse(kind, text, "config")


def from_file(kind: type[Kind], path: str | Path, part: str = "") -> Kind:
    """What is written in a JSON file, or under the name `part` in it if there is such a name.

    Raises:
        ConfigError: naming the file, and the first field that is missing, unknown or wrong.
    """
    try:
        text: str | bytes = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"config is {str(path)!r}; expected a JSON file with a {kind.__name__}, as its save(path) writes. "
            f"{error.strerror}."
        ) from error
    if part and has_part(path, part):
        text = json.dumps(json.loads(text)[part])
    return _parse(kind, text, str(path))


def has_part(path: str | Path, part: str) -> bool:
    """Whether a file holds a JSON object with such a name; not for a file that can't be read."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and part in content


def _parse(kind: type[Kind], text: str | bytes, source: str) -> Kind:
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_fault(kind, error)}") from error


def _first_fault(kind: Any, error: ValidationError) -> str:
    """What pydantic found, in our words."""
    fault = error.errors()[0]
    # Inside a rule pydantic names its kind as well.
    kind = next((RULES[part] for part in reversed(fault["loc"]) if part in RULES), kind)
    path = [part for part in fault["loc"] if part not in RULES]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    found, names = fault["input"], [each.name for each in fields(kind)]
    match fault["type"]:
        case "value_error":
            return str(fault["ctx"]["error"])
        case "json_invalid":
            return f"found no JSON; expected an object with fields of a {kind.__name__}. {fault['ctx']['error']}."
        case "dataclass_type":
            return f"found {found!r:.40}; expected an object with fields of a {kind.__name__}: {names}."
        case "union_tag_not_found" | "union_tag_invalid":
            return f"{field} is {found!r:.80}; expected a rule with a field by, one of {[*RULES]}."
        case "missing":
            return f"{field} is missing; expected it beside {sorted(found)}."
        case "unexpected_keyword_argument":
            return f"{field} is {found!r}, but a {kind.__name__} has no such field; expected some of {names}."
    return f"{field} is {found!r}; expected {fault['msg'].removeprefix('Input should be ')}."
