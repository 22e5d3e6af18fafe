"""Recipes; see `configs/common.py` for every setting."""
