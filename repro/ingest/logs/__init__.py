"""Read log files line by line. Each file in this folder reads the messages of one program or library."""
