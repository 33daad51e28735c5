"""Grounding on generated scenes: pictures of coloured shapes, questions about them, and how answers are scored."""
