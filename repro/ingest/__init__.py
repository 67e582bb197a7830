"""Read the evidence that other tools wrote, as records (`repro.trace.foreign`). Each format has its own module."""
