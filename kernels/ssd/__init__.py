"""State space duality (Mamba-2): a linear recurrence with one decay per head."""
