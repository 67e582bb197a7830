"""Read answers of RAS, the service in NCCL that reports the state of a job's communicators."""
