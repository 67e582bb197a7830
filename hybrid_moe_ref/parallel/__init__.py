"""How an unchanged model runs on many ranks."""
