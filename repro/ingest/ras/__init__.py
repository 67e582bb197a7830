"""Read answers of NCCL's RAS subsystem."""
