"""The recorder, which writes what one rank does to its witness file."""
