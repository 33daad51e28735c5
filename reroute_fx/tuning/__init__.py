"""Tuning: where a model reads its pictures, and which routing costs it least. Without labels."""
