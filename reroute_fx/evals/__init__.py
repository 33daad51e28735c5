"""Evaluation of routed models with lmms-eval (extra `[eval]`)."""
