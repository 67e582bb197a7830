"""Reproduce hangs of expert-parallel servers, find their causes from outside, and prove the fixes."""
