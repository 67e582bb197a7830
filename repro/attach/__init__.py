"""Record a foreign program: patch torch.distributed, and test an expert-parallel backend in pytest."""
