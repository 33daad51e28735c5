"""JSON files, and files in general, that are written."""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError


def write_json(path: str | Path, record: Any) -> None:
    """Write whole or not at all.

    Raises:
        InputError: the folder doesn't exist, or `path` is one.
    """
    target = check_file(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: str | Path) -> Path:
    """Raise `InputError` unless a file can be made there."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(
            f"path is {str(path)!r}; expected the name of a file in an existing folder. Make the folder first."
        )
    return target
