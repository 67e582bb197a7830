"""The record of what a rank did: the witness file, its recorder and readers, and records of other tools' evidence."""
