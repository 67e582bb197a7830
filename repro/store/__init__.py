"""A run on disk: its paths and files, and functions that make text safe to display."""
