"""Evidence that other tools wrote: what each said of a rank, as records that the rules of `verdict/partial` read."""
