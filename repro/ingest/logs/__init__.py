"""Text files line by line: one file per program whose messages are known."""
