"""Rules for lines of logs and for answers of NCCL's RAS."""
