"""Artifacts: what `compile` made, on disk."""

from .export import export
from .load import load
from .report import ArtifactReport

__all__ = ["ArtifactReport", "export", "load"]
