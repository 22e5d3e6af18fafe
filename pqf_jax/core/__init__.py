"""Data structures: variable trees, blocks, VQ arrays, channel axes, plans."""
