"""Read the stacks of threads, and find what a thread does from its frames."""
