"""Start a run: check the machine, fill the kernel cache, start ranks and reference, watch them and end them."""
