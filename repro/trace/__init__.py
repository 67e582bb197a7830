"""What a rank did: our own witness file (`witness`), its recorder (`recording`), and records of other tools' evidence
(`foreign`)."""
