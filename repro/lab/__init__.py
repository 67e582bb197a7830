"""Produce hangs on demand: the settings of a run, the scenarios, the run's processes, and the expected verdict."""
