"""Kernels for one kind of hardware; the plain forms are their oracles."""
