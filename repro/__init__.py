"""Reproduce hangs of expert-parallel servers, test fixes for them, and find out from evidence why a job hangs."""
