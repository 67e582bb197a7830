"""Stacks of threads, and what a thread does by its frames."""
