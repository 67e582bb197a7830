"""Reproduce and test the hangs of expert-parallel servers, and find out from evidence why a job hangs."""
