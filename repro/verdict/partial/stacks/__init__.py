"""Rules that judge the stacks of Python processes."""
