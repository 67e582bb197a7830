"""Redaction: what of a run is recognised as harmless, and the stand-ins for the rest."""
