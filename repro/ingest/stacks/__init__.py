"""Read the stacks of threads from the dumps of other tools, and derive from the frames what each thread does."""
