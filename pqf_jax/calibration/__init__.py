"""Repairs a quantized network from unlabelled samples, without gradients.

The dense and the quantized network run side by side, equation by equation.
Where a compressed kernel, a norm or a bias is read, its variables are chosen so
that the quantized network follows the dense one again.
"""
