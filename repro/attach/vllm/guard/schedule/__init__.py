"""What a rank issues and expects, and how the ranks compare it."""
