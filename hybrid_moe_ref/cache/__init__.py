"""The cache of a model: KV entries and recurrent states in pages of one size. `pages.py` works without torch."""
