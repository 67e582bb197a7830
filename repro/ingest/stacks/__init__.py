"""Read the stacks of threads from the dumps of other tools, and derive from its frames what a thread does."""
