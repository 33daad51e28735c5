"""Artifacts: what `compile` made, on disk."""

from .exporting import check_export, default_limits, export
from .loading import load
from .manifest import FORMATS
from .report import ArtifactReport

__all__ = ["FORMATS", "ArtifactReport", "check_export", "default_limits", "export", "load"]
