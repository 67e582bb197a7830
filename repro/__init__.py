"""Reproduce hangs of expert-parallel servers, find them from outside, and prove their cures."""
