"""Read the evidence that other tools wrote. Each format has its own module.

The result is a list of records: objects of `repro.trace.foreign.records`, such as one stack or one exception.
"""
