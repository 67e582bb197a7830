"""Compare a run with what it should produce: the expected verdict and the reference's tokens."""
