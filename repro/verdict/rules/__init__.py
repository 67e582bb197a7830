"""The rules of the judge, a file for each class of verdict or cause."""
