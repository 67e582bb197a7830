"""Names that tools give to operations and processes, and the one name or rank that each stands for."""
