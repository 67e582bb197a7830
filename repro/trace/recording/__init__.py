"""The recorder, which runs in each rank and writes the rank's witness file."""
