"""What is built before the ranks communicate."""
