"""Folders that appear whole or not at all."""

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ArtifactError

_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2) on Linux; RENAME_SWAP of renamex_np(2) on macOS is 2 as well."""
_LOCK = ".lock"


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` when the block succeeds.

    Until then `target` is as it was, and afterwards it is the new one: killed at any moment the process leaves one
    or the other. What a killed process has left beside it is removed by the next one. Systems that can't exchange
    folders in one step (Windows) move the old one aside first: killed in between, it lies in `.NAME.replaced-*`.

    Args:
        target: a path whose parent exists.
        overwrite: replace what is there.

    Raises:
        ArtifactError: `target` exists and `overwrite` is False, its parent does not exist or can't be written, the disk
            is full, or the file system can't exchange folders.
    """
    target = target.absolute()
    if not target.parent.is_dir():
        raise ArtifactError(f"path is {target}, but {target.parent} is no folder. Create it first.")
    if os.path.lexists(target):
        if not overwrite:
            raise ArtifactError(
                f"path is {target}, which exists. Choose another one, or pass overwrite=True."
            )
        if target.is_symlink() or not target.is_dir():
            raise ArtifactError(f"path is {target}, which is no folder; expected an artifact to overwrite.")
    try:
        _remove_remains(target)
        partial = target.with_name(f"{_prefix(target)}{uuid.uuid4().hex}")
        with _locked(partial):
            partial.mkdir()
            try:
                yield partial
                _flush(partial)
                _put(partial, target)
            finally:
                # What was replaced lies here now, or what was not finished.
                shutil.rmtree(partial, ignore_errors=True)
        _flush_one(target.parent)
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise ArtifactError(
            f"{target} could not be written: {what}. What was there before is untouched. Free space or choose another "
            f"path."
        ) from error


def check_free_space(folder: Path, size: int) -> None:
    """Raise OSError unless `size` bytes fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size} bytes are to be written, {free} are free")


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _aside(target: Path) -> str:
    return f".{target.name}.replaced-"


def _remove_remains(target: Path) -> None:
    """Remove what killed processes left: folders that nobody holds."""
    for name in {path.name.removesuffix(_LOCK) for path in target.parent.glob(f"{_prefix(target)}*")}:
        remains = target.with_name(name)
        with suppress(Timeout), _locked(remains):
            shutil.rmtree(remains, ignore_errors=True)
    if target.exists():
        for replaced in target.parent.glob(f"{_aside(target)}*"):
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which need not exist, as long as this process lives; raises Timeout if another one holds it."""
    path = folder.with_name(f"{folder.name}{_LOCK}")
    lock = FileLock(path, timeout=0)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Let everything in a folder reach the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush_one(Path(parent, name))
        _flush_one(Path(parent))


def _flush_one(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens files only, and flushes those that are open for writing.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(partial: Path, target: Path) -> None:
    """Move a folder to a path, or let it change places with what is there, in one step where the system can."""
    if not target.exists():
        os.rename(partial, target)
    elif not _exchange(partial, target):
        aside = target.with_name(f"{_aside(target)}{uuid.uuid4().hex}")
        os.rename(target, aside)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False if the system has no call for that.

    Raises:
        OSError: it has, but the file system can't.
    """
    library: Any = None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        moved = library.renamex_np(*paths, _EXCHANGE)
    elif hasattr(library, "renameat2"):
        moved = library.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE)
    else:
        return False
    if moved != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"can't exchange two folders on this file system ({os.strerror(number)})")
    return True
