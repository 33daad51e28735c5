"""Manifests are read without trusting them."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest

from reroute_fx import ArtifactError, Limits, RoutingConfig
from reroute_fx.artifact.files import FileEntry
from reroute_fx.artifact.manifest import NAME, SCHEMA, InputSpec, Manifest, ProgramFiles, _checksum
from reroute_fx.artifact.requirements import Requirements
from reroute_fx.capture.image_layout import FixedImages, GridImages
from reroute_fx.capture.positions import GridPositions

MANIFEST = Manifest(
    schema=SCHEMA,
    format="aot",
    name="llava-hf/llava-1.5-7b-hf",
    model="LlavaForConditionalGeneration",
    model_type="llava",
    dtype="float32",
    routing=RoutingConfig((2, 7), (0.5, 1 / 3)),
    limits=Limits(),
    inputs={"input_ids": InputSpec("int64", ("batch", "length", 3), required=True)},
    images=FixedImages(3, 336, 336, 576),
    positions=None,
    visual_ids=(32000,),
    requirements=Requirements("2.13.0", "cpu", "x86_64", ("avx2",)),
    versions={"torch": "2.13.0"},
    programs={"prefill": ProgramFiles("aot", ("programs/prefill_0.pt2",), "programs/prefill.json")},
    files={
        name: FileEntry(1, "0" * 64)
        for name in ("programs/prefill_0.pt2", "programs/prefill.json", "weights.safetensors")
    },
)
QWEN = replace(
    MANIFEST,
    images=GridImages(1176, 2, 14, None),
    positions=GridPositions(2, 2.0),
    requirements=Requirements("2.11.0", "cuda", "x86_64", (), (9, 0), "12.8"),
)


def rewrite(folder, change):
    """Change a manifest and sign it again, as someone would who means harm."""
    path = folder / NAME
    content = json.loads(path.read_text())
    change(content)
    content.pop("checksum", None)
    path.write_text(json.dumps({"checksum": _checksum(content), **content}))


@pytest.mark.parametrize("manifest", [MANIFEST, QWEN], ids=["fixed", "grid"])
def test_they_come_back_as_they_were(tmp_path, manifest):
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_routing_is_written_as_in_files_of_its_own(tmp_path):
    MANIFEST.write(tmp_path)
    written = json.loads((tmp_path / NAME).read_text())["routing"]
    assert written == MANIFEST.routing.to_dict()
    assert RoutingConfig.from_dict(written) == MANIFEST.routing


def test_every_changed_byte_is_noticed(tmp_path):
    MANIFEST.write(tmp_path)
    written, passed = (tmp_path / NAME).read_bytes(), 0
    for place in range(0, len(written), 7):
        changed = bytearray(written)
        changed[place] ^= 1
        (tmp_path / NAME).write_bytes(changed)
        with suppress(ArtifactError):
            assert Manifest.read(tmp_path) == MANIFEST  # white space
            passed += 1
    assert passed < len(written) // 7


@pytest.mark.parametrize("length", [0, 1, 100, -1, -3])
def test_what_is_cut_off_is_damaged(tmp_path, length):
    MANIFEST.write(tmp_path)
    written = (tmp_path / NAME).read_bytes().rstrip()
    (tmp_path / NAME).write_bytes(written[:length])
    with pytest.raises(ArtifactError, match="is damaged"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_damaged(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        Manifest.read(tmp_path)


def test_a_newer_schema_asks_for_a_newer_version(tmp_path):
    MANIFEST.write(tmp_path)
    rewrite(tmp_path, lambda content: content.update(schema=SCHEMA + 1, news={"a": 1}))
    with pytest.raises(
        ArtifactError, match=rf"schema {SCHEMA + 1}; this reroute_fx reads up to {SCHEMA}.*pip"
    ):
        Manifest.read(tmp_path)


def test_folders_without_a_manifest(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        Manifest.read(tmp_path)
    with pytest.raises(ArtifactError, match="expected the folder of an artifact"):
        Manifest.read(tmp_path / "missing")
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / NAME).symlink_to(tmp_path / "real.json")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("routing"), "routing: Field required"),
        (lambda c: c["limits"].update(batch=0), r"limits.*batch is 0"),
        (lambda c: c["limits"].update(batch="8"), r"limits\.batch"),
        (lambda c: c["routing"].update(decision_layers=[-1, 2]), "routing"),
        (lambda c: c["routing"].update(keep_ratios=[0.5, 2.0]), "routing"),
        (lambda c: c["routing"].update(keep_ratio=[0.5, 0.5]), r"routing\.keep_ratio"),
        (lambda c: c["images"].update(kind="other"), "images"),
        (lambda c: c.update(schema=0), "Export the model again"),
        (lambda c: c.update(format="pickle"), "Export the model again"),
        (lambda c: c["files"].pop("weights.safetensors"), "files or formats that it can't hold"),
        (lambda c: c["programs"]["prefill"].update(format="x"), "files or formats that it can't hold"),
        (
            lambda c: c["programs"]["prefill"].update(schedule="programs/x.json"),
            "files or formats that it can't hold",
        ),
        (lambda c: c["files"]["weights.safetensors"].update(size=-1.5), "files"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, change, match):
    MANIFEST.write(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ArtifactError, match=match):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../weights.safetensors",
        "programs/../../x",
        "/etc/passwd",
        "programs//x",
        "programs/./x",
        "..",
        ".",
        "",
        ".hidden",
        "programs/.hidden",
        "a\\..\\b",
        "C:\\x",
        "a\x00b",
        "a\nb",
        "~/x",
        "weights.safetensors/",
        "file:///x",
    ],
)
@pytest.mark.parametrize("where", ["program", "schedule", "files"])
def test_paths_stay_inside(tmp_path, name, where):
    def change(content):
        entry = {"size": 1, "sha256": "0" * 64}
        content["files"][name] = entry
        if where == "program":
            content["programs"]["prefill"]["files"] = [name]
        elif where == "schedule":
            content["programs"]["prefill"]["schedule"] = name or "/"

    MANIFEST.write(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ArtifactError, match=r"names the file .*stays in the artifact"):
        Manifest.read(tmp_path)
