"""Rules for recorder dumps, and their shared parts: moments, members, waits."""
