"""Observe the processes of a job from outside: /proc, py-spy, and interfaces that the job offers. Change nothing."""
