"""Reproduce hangs of expert-parallel servers, find the causes of hangs from outside the processes, and test fixes."""
