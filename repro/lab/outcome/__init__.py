"""What a run should produce, and whether it did: the expected verdict and the reference's tokens."""
