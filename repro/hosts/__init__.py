"""Ask the operating system of a host about the processes and locks of ranks, and ask these ranks for evidence."""
