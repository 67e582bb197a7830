"""Translate the names that different tools print: an operation's name to torch's name, a process's name to its rank."""
