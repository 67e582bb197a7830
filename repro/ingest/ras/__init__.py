"""Answers of the RAS subsystem of NCCL."""
