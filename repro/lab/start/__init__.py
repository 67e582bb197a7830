"""Start a run: check the machine, fill its kernel cache, start ranks and reference, watch them and end them."""
