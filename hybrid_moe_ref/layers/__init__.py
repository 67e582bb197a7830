"""The layers. Nothing here depends on ranks, process groups or environment variables."""
