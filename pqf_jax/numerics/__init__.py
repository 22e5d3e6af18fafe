"""Sums, products and gathers whose bits do not depend on order or hardware."""
