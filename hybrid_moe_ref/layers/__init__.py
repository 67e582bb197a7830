"""The layers' mathematics. Nothing here knows of ranks, process groups or environment variables."""
