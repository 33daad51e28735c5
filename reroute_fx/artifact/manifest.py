"""What an artifact says of itself: `manifest.json`, read without trusting it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ..capture.image_layout import AnyImages
from ..capture.layer_features import LayerFeatures
from ..capture.positions import GridPositions
from ..capture.prompt_groups import PromptGroups
from ..config.limits import Limits
from ..config.routing_config import RoutingConfig
from ..errors import ArtifactError
from ..lowering.weights import WEIGHTS
from ..methods import remember
from .files import FileEntry, check_name
from .requirements import Requirements

NAME = "manifest.json"
PROCESSOR = "processor"
"""Folder of the processor inside an artifact."""
SCHEMA = 2
FORMATS = ("aot", "onnx", "tensorrt")
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class ProgramFiles:
    """A program of an artifact.

    Attributes:
        format: one of `FORMATS`.
        files: packages or models that it is made of.
        schedule: how packages are called; None if it is one model.
    """

    format: str
    files: tuple[str, ...]
    schedule: str | None = None


@dataclass(frozen=True)
class InputSpec:
    """An input of a call.

    Attributes:
        dtype: of the tensor.
        shape: sizes, or names of those that may differ from call to call.
        required: in a prompt with pictures.
    """

    dtype: str
    shape: tuple[int | str, ...]
    required: bool


@dataclass(frozen=True)
class Manifest:
    """An artifact.

    Attributes:
        schema: version of this layout.
        format: one of `FORMATS`.
        name: id of the model, or name of its folder; empty if it has none.
        model: class that it was exported from.
        model_type: of its config.
        dtype: of its weights.
        routing: what is routed.
        limits: the largest call.
        inputs: contract of a call, by name.
        images: how it takes pictures.
        positions: how rotary positions follow from a prompt; None if they count its tokens.
        layer_features: visual features that are added inside the decoder; None if there are none.
        groups: which tokens of a prompt see each other; None if none sees later ones.
        visual_ids: placeholders of visual features.
        requirements: what its code was compiled for; None if it runs anywhere.
        versions: of the packages that made it.
        programs: by name.
        files: all files but this one.
        asked: inputs that the program for prompts takes because rules ask for them.
        stateful: layers that know earlier tokens by a state, not by attention.
    """

    schema: int
    format: str
    name: str
    model: str
    model_type: str
    dtype: str
    routing: RoutingConfig
    limits: Limits
    inputs: dict[str, InputSpec]
    images: Annotated[AnyImages, Field(discriminator="kind")]
    positions: GridPositions | None
    visual_ids: tuple[int, ...]
    requirements: Requirements | None
    versions: dict[str, str]
    programs: dict[str, ProgramFiles]
    files: dict[str, FileEntry]
    asked: tuple[str, ...] = ()
    layer_features: LayerFeatures | None = None
    groups: PromptGroups | None = None
    stateful: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return self.files[WEIGHTS].size

    def write(self, folder: Path) -> None:
        content = asdict(self)
        content = {"checksum": _checksum(content), **content}
        (folder / NAME).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of an artifact.

        Raises:
            ArtifactError: there is none, it is damaged, or a later reroute_fx wrote it.
        """
        if not folder.is_dir():
            raise ArtifactError(f"path is {folder}; expected the folder of an artifact.")
        path = folder / NAME
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{folder} has no {NAME}; expected an artifact of reroute_fx.export.")
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes; expected at most {_LARGEST}.")
        try:
            content = json.loads(path.read_text())
            schema, given = content.get("schema"), content.pop("checksum", None)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged: {error}. Copy the whole folder again.") from error
        if isinstance(schema, int) and schema > SCHEMA:
            raise ArtifactError(
                f"{path} has schema {schema}; this reroute_fx reads up to {SCHEMA}. Run pip install -U reroute-fx."
            )
        if given != _checksum(content):
            raise ArtifactError(f"{path} was changed since it was written. Copy the whole folder again.")
        return cls._checked(content, path)

    @classmethod
    def _checked(cls, content: dict[str, Any], path: Path) -> "Manifest":
        routing = content.get("routing")
        if isinstance(routing, dict) and isinstance(routing.get("method"), str):
            # Its ranking rule is in the programs.
            remember(routing["method"])
        try:
            manifest = _ADAPTER.validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ArtifactError(
                f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Export the model again."
            ) from error
        named = {WEIGHTS}
        for name, program in manifest.programs.items():
            if program.format != "aot" and len(program.files) != 1:
                raise ArtifactError(
                    f"{path}: {name} has {len(program.files)} files; expected 1 of format {program.format!r}. "
                    f"Export the model again."
                )
            named |= {*program.files, *([program.schedule] if program.schedule else [])}
        for name in (*named, *manifest.files):
            check_name(name)
        formats = {manifest.format, *(program.format for program in manifest.programs.values())}
        if manifest.schema != SCHEMA or not formats <= set(FORMATS) or not named <= manifest.files.keys():
            raise ArtifactError(f"{path} names files or formats that it can't hold. Export the model again.")
        return manifest


_ADAPTER = TypeAdapter(Manifest)


def _checksum(content: dict[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()
