"""The rules of the judge: a file for each verdict class, or for each kind of cause."""
