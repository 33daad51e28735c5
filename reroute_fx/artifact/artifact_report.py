"""What an artifact holds."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..common.tables import as_text
from .manifest import Manifest


@dataclass(frozen=True)
class ArtifactReport:
    """An artifact in words; ``str(report)`` is a table, `to_dict` is ready for JSON.

    Attributes:
        path: of its folder.
        manifest: what it says of itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def of(cls, folder: Path) -> "ArtifactReport":
        """The report of an artifact, from its manifest alone.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        return cls(folder, Manifest.read(folder))

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.manifest.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        return {"path": str(self.path), "bytes": self.total_bytes, **asdict(self.manifest)}

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        manifest = self.manifest
        routing = manifest.routing
        title = f"{manifest.name or manifest.model}: {routing.method} / {routing.action}, {manifest.format}"
        return Group(Text(title, style="bold"), self._facts(), self._program_table(), self._input_table())

    def _facts(self) -> Table:
        manifest, routing = self.manifest, self.manifest.routing
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        kept = zip(routing.decision_layers, routing.kept, strict=True)
        decisions = ", ".join(f"{what} before {layer}" for layer, what in kept)
        limits = manifest.limits
        table.add_row("folder", str(self.path))
        table.add_row("model", f"{manifest.model}, {manifest.name or 'without a name'}")
        table.add_row("routing", f"keeps {decisions}" if decisions else "none")
        table.add_row(
            "limits",
            f"{limits.batch} rows, {limits.length} tokens in a row, {limits.image_tokens} tokens in a picture",
        )
        table.add_row("runs on", str(manifest.requirements or "any machine with ONNX Runtime"))
        table.add_row("made with", ", ".join(f"{name} {v}" for name, v in manifest.versions.items()))
        table.add_row("weights", f"{_mebibytes(manifest.weight_bytes)}, {manifest.dtype}")
        share = self.total_bytes / manifest.weight_bytes
        table.add_row("in all", f"{_mebibytes(self.total_bytes)}, {share:.2f} of the weights")
        return table

    def _program_table(self) -> Table:
        table = Table("program", "files", "MiB", title="Programs")
        for name, program in self.manifest.programs.items():
            size = sum(self.manifest.files[file].size for file in program.files)
            table.add_row(name, str(len(program.files)), f"{size / 2**20:.1f}")
        for column in table.columns[1:]:
            column.justify = "right"
        return table

    def _input_table(self) -> Table:
        table = Table("input", "dtype", "shape", "", title="Inputs")
        for name, spec in self.manifest.inputs.items():
            table.add_row(name, spec.dtype, str(list(spec.shape)), "required" if spec.required else "")
        return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
