"""Record a program that is not ours: patch torch.distributed, and test an expert-parallel backend in pytest."""
