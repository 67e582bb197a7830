"""Where the processes of a server meet: the store, its votes, and the memory of an engine and its workers."""
