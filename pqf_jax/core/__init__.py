"""What the data is: trees, blocks, VQ arrays, channels, plans."""
