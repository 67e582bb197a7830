"""How the processes of a server exchange data: torch's store, votes in it, and memory of one engine and its workers."""
