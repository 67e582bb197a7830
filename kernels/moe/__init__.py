"""The experts of a mixture, each applied to the rows that chose it."""
