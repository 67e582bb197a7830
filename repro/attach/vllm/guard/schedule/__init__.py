"""The collectives that a rank issues and the schedule that it expects, and how the ranks compare these."""
