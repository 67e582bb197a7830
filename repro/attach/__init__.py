"""Record the collectives of a torch.distributed program by hooks in torch, vLLM and other libraries.

This folder also has the pytest fixture ``ep_ranks`` for tests of expert-parallel code.
"""
