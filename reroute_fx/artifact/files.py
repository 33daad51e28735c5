"""Files of an artifact: named by plain relative paths, inside its folder, and unchanged since they were written."""

import hashlib
import re
import stat
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_PACKAGED = (".so", ".cpp", ".json", ".cubin", ".hsaco", ".spv", ".o")
_PACKAGED_NAMES = {"archive_format", "archive_version", "version", "byteorder", "serialization_id"}


@dataclass(frozen=True)
class FileEntry:
    """What a file holds.

    Attributes:
        size: bytes.
        sha256: of its content, hexadecimal.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return cls(path.stat().st_size, digest.hexdigest())


def list_files(folder: Path) -> dict[str, FileEntry]:
    """All files of a folder by their relative paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileEntry.of(path) for path in paths}


def check_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise ArtifactError unless the files of an artifact are there, inside it, and as they were written.

    Files beside them are left alone at the top, where nothing reads them, and refused in the folders below.
    """
    for name in files:
        _check_place(folder, name)
    folders = {name.split("/")[0] for name in files if "/" in name}
    for path in (path for name in sorted(folders) for path in (folder / name).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in files and not path.is_dir():
            raise ArtifactError(f"{folder} holds {name}, which its manifest doesn't know. Remove it.")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: _check_content(folder / item[0], item[1]), files.items()))


def check_name(name: str) -> None:
    """Raise ArtifactError unless a name is a plain relative path."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"The manifest names the file {name!r}; expected a relative path of letters, digits, '.', '_' and '-' "
            f"that stays in the artifact. Don't use this artifact; get it again from where it was exported."
        )


def _check_place(folder: Path, name: str) -> None:
    check_name(name)
    path = folder
    for part in name.split("/"):
        path = path / part
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            raise ArtifactError(f"{name} is missing from {folder}. Copy the whole folder again.") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ArtifactError(
                f"{path.relative_to(folder)} in {folder} is a link or no plain file; expected files only. Copy the "
                f"artifact with its links followed (cp -RL)."
            )
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{name} in {folder} is a folder; expected a file. Copy the whole folder again.")


def _check_content(path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.size:
        raise ArtifactError(
            f"{path} has {size} bytes; expected {entry.size}. It was cut off or replaced. Copy the whole folder again."
        )
    if FileEntry.of(path) != entry:
        raise ArtifactError(
            f"{path} is not the file that was exported: its checksum differs. Copy the whole folder again."
        )


def check_package(path: Path) -> None:
    """Raise ArtifactError unless an AOTInductor package holds compiled code and its description, nothing else.

    A packaged model may carry Python objects, which are unpickled when it is read. Those of an artifact have none.
    """
    try:
        names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile as error:
        raise ArtifactError(f"{path} is no package of compiled code. Export the model again.") from error
    for name in names:
        last = name.rsplit("/", 1)[-1]
        is_plain = not name.startswith("/") and ".." not in name.split("/") and "\\" not in name
        if not is_plain or not (last.endswith(_PACKAGED) or last in _PACKAGED_NAMES):
            raise ArtifactError(
                f"{path} holds {name!r}; expected compiled code and its description only. Don't use this artifact; "
                f"get it again from where it was exported."
            )
