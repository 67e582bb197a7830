"""Rules about lines of logs, and about the answers of NCCL's RAS."""
