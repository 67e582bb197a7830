"""Rules about the stacks of Python processes."""
