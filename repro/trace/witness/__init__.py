"""The witness file of one rank: its format, and functions that read it, follow it while the rank writes, shorten it for
a bundle, and rebuild an earlier state of it."""
