"""Folders that are written to."""

from pathlib import Path

from ..errors import InputError


def check_folder(field: str, path: str | Path) -> Path:
    """The path of a folder that is there or can be made.

    Raises:
        InputError: it is a file; the message names the field.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{field} is {str(path)!r}, a file; expected a folder, or a name that is free.")
    return folder
