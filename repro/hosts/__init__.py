"""What each host's operating system says about the ranks, and what can be asked of their processes."""
