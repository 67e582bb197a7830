"""Convert the evidence that other tools wrote to records (`repro.trace.foreign`). Each format has its own module."""
