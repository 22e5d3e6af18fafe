"""The functions by which each platform takes a step; `selection` lists them."""
