"""Read other people's evidence: one file per format, each to the records of `repro.trace.observed`."""
