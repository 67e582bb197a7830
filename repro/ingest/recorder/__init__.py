"""Read Flight Recorder dumps of torch.distributed."""
