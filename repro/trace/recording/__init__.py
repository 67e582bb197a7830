"""The recorder, which writes what one rank does to the rank's witness file."""
