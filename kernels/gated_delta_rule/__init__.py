"""Gated delta rule: a fast-weight memory that decays, forgets what a key held and writes the new value."""
