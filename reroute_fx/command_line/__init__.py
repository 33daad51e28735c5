"""The command `reroute-fx`."""
