"""What `pack.py` is made of: the layout of a packed file, part by part."""
