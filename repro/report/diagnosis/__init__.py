"""The page and the bug report of a diagnosis, and the merged stack tree that both show."""
