"""Search for the channel order of a group whose sub-vectors quantize best.

consumers    finds the compressed kernels that read a group
covariance   gives the log-determinant of a kernel's sub-vectors in any order
objective    averages it over the kernels of a group, and bounds its change
search       sorts, assigns and swaps channels to make it small
swaps        swaps pairs of channels
"""
