"""Artifacts: what `compile` made, on disk."""

from .artifact_report import ArtifactReport
from .exporting import check_export, default_limits, export
from .loading import load
from .manifest import FORMATS

__all__ = ["FORMATS", "ArtifactReport", "check_export", "default_limits", "export", "load"]
