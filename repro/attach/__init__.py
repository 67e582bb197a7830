"""Record programs from outside this repository by patching torch.distributed; test expert-parallel code in pytest."""
