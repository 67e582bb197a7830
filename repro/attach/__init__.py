"""Record the collectives of programs that are not ours, by replacing functions of torch.distributed, of vLLM and of
other libraries. This folder also has the pytest fixture for tests of expert-parallel code."""
