"""Commands with many runs: the matrix of starts, and the search for the smallest run that still hangs."""
