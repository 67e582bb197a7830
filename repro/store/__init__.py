"""A run on disk: its paths and files, and text that is safe to display."""
