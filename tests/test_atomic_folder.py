"""Folders that appear whole or not at all, whatever happens while they are written."""

import errno
import multiprocessing
import os
import random
import subprocess
import sys
import time

import pytest

from reroute_fx.artifact import atomic_folder
from reroute_fx.artifact.atomic_folder import whole_folder
from reroute_fx.errors import ArtifactError

FILES = {
    "manifest.json": b"{}",
    "programs/region_0.pt2": b"code" * 1000,
    "weights.safetensors": b"w" * 100_000,
}


def fill(folder, mark):
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mark + content)


def mark_of(folder):
    """What a folder was filled with, if it is whole."""
    contents = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert contents.keys() == FILES.keys()
    (mark,) = {contents[name][:1] for name in FILES}
    assert contents == {name: mark + content for name, content in FILES.items()}
    return mark


def write_and_fail(target, error, overwrite=False):
    with whole_folder(target, overwrite) as folder:
        fill(folder, b"2")
        raise error


def test_a_new_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "llava-128"
    with whole_folder(target) as folder:
        fill(folder, b"1")
        assert not target.exists()
        assert folder.parent == tmp_path
    assert mark_of(target) == b"1"
    assert os.listdir(tmp_path) == ["llava-128"]


def test_a_folder_is_replaced_when_asked_for(tmp_path):
    target = tmp_path / "llava-128"
    for mark in (b"1", b"2"):
        with whole_folder(target, overwrite=True) as folder:
            fill(folder, mark)
        assert mark_of(target) == mark
    assert os.listdir(tmp_path) == ["llava-128"]


def test_a_folder_is_not_replaced_unasked(tmp_path):
    target = tmp_path / "llava-128"
    with whole_folder(target) as folder:
        fill(folder, b"1")
    with pytest.raises(ArtifactError, match=r"exists.*overwrite=True"), whole_folder(target):
        pytest.fail("nothing may be written")
    assert mark_of(target) == b"1"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, overwrite):
    target = tmp_path / "llava-128"
    if overwrite:
        with whole_folder(target) as folder:
            fill(folder, b"1")
    with pytest.raises(ZeroDivisionError):
        write_and_fail(target, ZeroDivisionError(), overwrite)
    assert os.listdir(tmp_path) == (["llava-128"] if overwrite else [])
    if overwrite:
        assert mark_of(target) == b"1"


def test_a_full_disk_is_said(tmp_path):
    target = tmp_path / "llava-128"
    with pytest.raises(ArtifactError, match="the disk is full"):
        write_and_fail(target, OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_can_not_exchange_is_said(tmp_path, monkeypatch):
    target = tmp_path / "llava-128"
    with whole_folder(target) as folder:
        fill(folder, b"1")
    monkeypatch.setattr(
        "reroute_fx.artifact.atomic_folder._EXCHANGE", 0xFF
    )  # as one that doesn't know the flag
    with pytest.raises(ArtifactError, match="can't exchange"), whole_folder(target, overwrite=True) as folder:
        fill(folder, b"2")
    assert mark_of(target) == b"1"
    assert os.listdir(tmp_path) == ["llava-128"]


def replace_once(target):
    for mark in (b"1", b"2"):
        with whole_folder(target, overwrite=True) as folder:
            fill(folder, mark)
        assert mark_of(target) == mark
    assert os.listdir(target.parent) == [target.name]


class MacLibrary:
    """The C library of macOS, as far as it is called."""

    def __init__(self):
        self.swapped = 0

    def renamex_np(self, one, other, flags):
        assert flags == 2  # RENAME_SWAP
        os.rename(one, one + b".old")
        os.rename(other, one)
        os.rename(one + b".old", other)
        self.swapped += 1
        return 0


@pytest.fixture
def system(monkeypatch):
    """Let `atomic_folder` run as on another system."""

    def pretend(name, library):
        monkeypatch.setattr(sys, "platform", name)
        monkeypatch.setattr(atomic_folder.ctypes, "CDLL", lambda *_, **__: library)

    return pretend


def test_macos_has_a_call_of_its_own(tmp_path, system):
    library = MacLibrary()
    system("darwin", library)
    replace_once(tmp_path / "llava-128")
    assert library.swapped == 1


class WindowsCalls:
    """`os` as it is on Windows, as far as it is called."""

    def __getattr__(self, name):
        if name == "O_DIRECTORY":
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path, flags):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Windows opens no folders")
        assert flags & os.O_RDWR, "Windows flushes what is open for writing"
        return os.open(path, flags)


@pytest.mark.parametrize("name", ["win32", "darwin", "linux"])
def test_systems_without_such_a_call_move_the_old_one_aside(tmp_path, system, name, monkeypatch):
    """Windows, which also opens no folders, and old C libraries."""
    system(name, object())
    if name == "win32":
        monkeypatch.setattr(atomic_folder, "os", WindowsCalls())
    replace_once(tmp_path / "llava-128")


def test_the_old_one_comes_back_if_the_new_one_can_not_be_moved(tmp_path, system, monkeypatch):
    target = tmp_path / "llava-128"
    with whole_folder(target) as folder:
        fill(folder, b"1")
    system("win32", None)
    rename = os.rename

    def fail(source, goal):
        if ".partial-" in str(source):
            raise PermissionError("in use")
        rename(source, goal)

    monkeypatch.setattr(atomic_folder.os, "rename", fail)
    with pytest.raises(ArtifactError, match="in use"), whole_folder(target, overwrite=True) as folder:
        fill(folder, b"2")
    assert mark_of(target) == b"1"
    assert os.listdir(tmp_path) == ["llava-128"]


@pytest.mark.full("19 s in a process of its own; another system than the gate runs on")
def test_without_fcntl_artifacts_are_written_and_locked(tmp_path):
    """As on Windows: everything is imported, and folders that another one holds are left alone."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from pathlib import Path\n"
        "import reroute_fx, reroute_fx.command_line.main\n"
        "from reroute_fx import compile, export, load\n"
        "from reroute_fx.artifact.atomic_folder import whole_folder\n"
        f"target = Path({str(tmp_path)!r}, 'llava')\n"
        "with whole_folder(target) as first:\n"
        "    with whole_folder(target) as second:\n"
        "        assert first.exists()\n"
        "    (first / 'file').write_text('1')\n"
        "    target.rmdir()\n"
        "assert (target / 'file').read_text() == '1'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert os.listdir(tmp_path) == ["llava"]


def test_what_is_no_folder_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with (
            pytest.raises(ArtifactError, match="no folder"),
            whole_folder(tmp_path / name, overwrite=True),
        ):
            pytest.fail("nothing may be written")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()


def test_a_parent_that_is_missing_is_said(tmp_path):
    with pytest.raises(ArtifactError, match=r"is no folder\. Create it"), whole_folder(tmp_path / "a" / "b"):
        pytest.fail("nothing may be written")


def test_remains_are_removed_but_not_what_another_writes(tmp_path):
    target = tmp_path / "llava-128"
    remains = tmp_path / ".llava-128.partial-0"
    remains.mkdir()
    fill(remains, b"0")
    with whole_folder(target, overwrite=True) as first:
        assert not remains.exists()
        fill(first, b"1")
        with whole_folder(target, overwrite=True) as second:
            assert first.exists()
            fill(second, b"2")
        assert mark_of(target) == b"2"
    assert mark_of(target) == b"1"
    assert os.listdir(tmp_path) == ["llava-128"]


def write_forever(target):
    while True:
        for mark in (b"2", b"3"):
            with whole_folder(target, overwrite=True) as folder:
                fill(folder, mark)


def test_killed_at_any_moment_one_or_the_other_is_there(tmp_path):
    target = tmp_path / "llava-128"
    with whole_folder(target) as folder:
        fill(folder, b"1")
    generator, seen = random.Random(0), set()
    for _ in range(20):
        writer = multiprocessing.get_context("fork").Process(target=write_forever, args=(target,))
        writer.start()
        time.sleep(generator.uniform(0, 0.1))
        writer.kill()
        writer.join()
        seen.add(mark_of(target))
    assert seen & {b"2", b"3"}
    with whole_folder(target, overwrite=True) as folder:
        fill(folder, b"4")
    assert os.listdir(tmp_path) == ["llava-128"]
