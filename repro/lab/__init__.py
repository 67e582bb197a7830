"""Hangs on demand: settings, scenarios, the processes of a run, and what is expected of it."""
