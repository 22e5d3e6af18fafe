"""Algorithms that take arrays and give arrays."""
