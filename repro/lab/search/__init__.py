"""The commands that do many runs: `matrix` (which starts are slow) and `minimise` (the smallest run that hangs)."""
