"""Observe the processes of a job from outside, without changing these processes.

The sources are /proc, py-spy, and interfaces that the job offers.
"""
