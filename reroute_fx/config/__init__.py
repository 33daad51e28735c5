"""What to route."""
