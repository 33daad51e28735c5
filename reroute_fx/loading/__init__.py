"""Models and prompts by name, for the command line and for evaluations."""
