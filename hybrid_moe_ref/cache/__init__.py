"""The cache of a step: KV entries and recurrent states in pages of one size. `pages` works without torch."""
