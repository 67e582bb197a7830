"""Compare a run with what it should produce: the expected verdict and the tokens of the single-process reference."""
