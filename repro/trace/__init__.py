"""What a rank did: the witness file, its recorder and readers, and the records of other people's evidence."""
