"""Regions on Inductor: compiled at their first call, or ahead of time."""
