"""Divides a byte budget among the kernels of a network.

What k-means would lose is predicted from the weights; what the outputs lose by
it is measured, or every kernel counts alike; the choices that lose least within
the budget are then found by dynamic programming.
"""
