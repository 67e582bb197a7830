"""Look at the processes of a job from outside: /proc, py-spy, and what the job offers. Nothing here changes it."""
