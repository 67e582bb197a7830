"""Redaction: decide which strings of a run are known to be harmless, and replace the others by stand-ins."""
