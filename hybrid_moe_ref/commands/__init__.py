"""The commands of `python -m hybrid_moe_ref`: a file's `run(args)` prints the answer and returns the exit status.

To import torch takes seconds. So only the functions that compute import torch, and a usage error is reported at once.
"""
