"""What a rank issues and expects to issue, and how the ranks compare it."""
