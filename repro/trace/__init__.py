"""What a rank did, as far as a piece of evidence shows it."""
