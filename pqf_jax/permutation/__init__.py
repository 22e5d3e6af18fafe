"""Finds the order of a group's channels whose sub-vectors quantize best."""
