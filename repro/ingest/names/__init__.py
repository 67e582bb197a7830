"""Names that tools give to operations and processes, and the canonical name or the rank of each."""
