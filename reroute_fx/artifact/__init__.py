"""Artifacts: what `compile` made, on disk."""

from .export import default_limits, export
from .load import load
from .manifest import FORMATS
from .report import ArtifactReport

__all__ = ["FORMATS", "ArtifactReport", "default_limits", "export", "load"]
