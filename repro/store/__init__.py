"""Paths of a run's files, typed readers and writers of these files, and functions that make text safe to print."""
