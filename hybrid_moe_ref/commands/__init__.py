"""The commands of `python -m hybrid_moe_ref`: each file has `run(args)`, which prints and returns the exit status.

Only the functions that compute import torch, so that usage errors are reported at once.
"""
