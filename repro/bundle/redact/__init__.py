"""Redaction: decide which strings of a run are known to be harmless, and replace or leave out all other strings."""
