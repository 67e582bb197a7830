"""Ask the operating system of a host about the ranks' processes and locks, and request evidence from the processes."""
