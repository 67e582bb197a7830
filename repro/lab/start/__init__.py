"""Start a run: check the machine, fill the kernel cache, start the ranks, watch them, and end all processes."""
