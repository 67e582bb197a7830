"""Translate names that tools print: the name of an operation to torch's name, the name of a process to its rank."""
