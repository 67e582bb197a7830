"""Rules about recorder dumps, and what they share: moments, members, waits."""
