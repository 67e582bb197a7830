"""What each host's operating system says about the ranks, and what can be requested from their processes."""
