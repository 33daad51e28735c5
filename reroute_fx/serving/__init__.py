"""Serving: requests of many people on one routed model, and an OpenAI-compatible server around it."""
