"""Data exchange of a server's processes: torch's store, votes through the store, and memory that an engine shares with
its workers."""
