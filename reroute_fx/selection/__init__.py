"""Which tokens a call keeps: planned before it runs, and found in what it returned."""
