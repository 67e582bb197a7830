"""Types of records, which `repro.ingest` makes from evidence of other tools and `repro.verdict.partial` judges."""
