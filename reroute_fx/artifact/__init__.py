"""Artifacts: what `compile` made, on disk."""
