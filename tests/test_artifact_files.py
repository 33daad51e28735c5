"""Files of an artifact are those that were written, and lie inside it."""

import os
import pickle
import zipfile

import pytest

from reroute_fx import ArtifactError
from reroute_fx.artifact.files import check_files, check_package, list_files


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "artifact"
    for name, content in (
        ("weights.safetensors", b"w" * 5000),
        ("programs/prefill_0.pt2", b"code" * 3),
        ("processor/tokenizer.json", b"{}"),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_what_was_written_passes(folder):
    files = list_files(folder)
    assert set(files) == {"weights.safetensors", "programs/prefill_0.pt2", "processor/tokenizer.json"}
    check_files(folder, files)


def test_what_nothing_reads_may_lie_beside_it(folder):
    files = list_files(folder)
    (folder / "README.md").write_text("mine")
    (folder / ".gitattributes").write_text("")
    check_files(folder, files)


@pytest.mark.parametrize("name", ["processor/tokenizer.py", "programs/x.pkl", "processor/deep/chat.json"])
def test_what_something_reads_may_not(folder, name):
    files = list_files(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    with pytest.raises(ArtifactError, match=rf"holds {name}.*doesn't know"):
        check_files(folder, files)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "programs/prefill_0.pt2", "processor/tokenizer.json"]
)
def test_damage_is_named(folder, name):
    files, path = list_files(folder), folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=rf"{path} has {len(content) - 1} bytes; expected {len(content)}"):
        check_files(folder, files)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=rf"{path} is not the file .*checksum differs"):
        check_files(folder, files)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        check_files(folder, files)
    path.mkdir()
    with pytest.raises(ArtifactError, match=rf"{name} in .* is a folder"):
        check_files(folder, files)


@pytest.mark.parametrize("name", ["weights.safetensors", "programs/prefill_0.pt2"])
def test_links_are_refused(folder, name, tmp_path):
    """Even to the same content: what lies outside can change after it was checked."""
    files, path = list_files(folder), folder / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=rf"{name} in .* is a link"):
        check_files(folder, files)


def test_linked_folders_are_refused(folder, tmp_path):
    files = list_files(folder)
    (folder / "programs").rename(tmp_path / "elsewhere")
    (folder / "programs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"programs in .* is a link"):
        check_files(folder, files)


def test_what_is_no_file_is_refused(folder):
    files, path = list_files(folder), folder / "programs" / "prefill_0.pt2"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="is a link or no plain file"):
        check_files(folder, files)


def package(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps(print))
    return path


def test_packages_hold_code_and_its_description(tmp_path):
    check_package(
        package(
            tmp_path / "region.pt2",
            "region/data/aotinductor/model/x.wrapper.so",
            "region/data/aotinductor/model/x.wrapper.cpp",
            "region/data/aotinductor/model/x_metadata.json",
            "region/archive_format",
            "region/.data/version",
        )
    )


@pytest.mark.parametrize(
    "name",
    [
        "region/data/constants/model.pkl",
        "region/data/sample_inputs/model.pt",
        "region/data/weights/weight_0",
        "region/extra/code.py",
        "../x.so",
        "region/../../x.so",
        "/tmp/x.so",
        "region\\..\\x.so",
    ],
)
def test_packages_with_anything_else_are_refused(tmp_path, name):
    path = package(tmp_path / "region.pt2", "region/archive_format", name)
    with pytest.raises(ArtifactError, match="expected compiled code"):
        check_package(path)


def test_what_is_no_package_is_refused(tmp_path):
    (tmp_path / "region.pt2").write_bytes(pickle.dumps(print))
    with pytest.raises(ArtifactError, match="no package of compiled code"):
        check_package(tmp_path / "region.pt2")
