"""Read evidence from other tools: one file per format, each producing records of `repro.trace.foreign.records`."""
