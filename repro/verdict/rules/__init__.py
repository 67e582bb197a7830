"""The rules of the judge: each file finds one class of verdict, or one cause."""
