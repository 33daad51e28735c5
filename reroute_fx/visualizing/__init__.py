"""Pictures of what was routed: which visual tokens ran through each stage, and how they were scored."""

from .visualize import check_visualize, visualize

__all__ = ["check_visualize", "visualize"]
