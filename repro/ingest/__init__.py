"""Read the evidence that other tools wrote, one file of code per format, into records (`repro.trace.foreign`)."""
