"""Readers of the file formats in which data sets are stored."""
