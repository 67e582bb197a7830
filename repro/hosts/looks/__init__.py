"""Observe the processes of a job from outside, without changing them: by /proc, py-spy, and interfaces that the job
offers."""
