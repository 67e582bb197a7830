"""The files of a run: their paths, typed readers and writers, and functions that make untrusted text safe to print."""
