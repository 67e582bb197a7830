"""The types of the records that `repro.ingest` makes from the evidence of other tools, and `verdict/partial` judges."""
