"""Rules for the stacks of Python processes."""
