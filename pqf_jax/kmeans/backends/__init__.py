"""The functions by which each platform takes a step; `loop` chooses.

A step needs of every cluster the sum of its sub-vectors, of their squared
norms, and their number. All are summed in integers
(`pqf_jax.numerics.segments`), so that neither the order nor the number of
devices matters. The backends, whose interface is in `base`:

- `portable`: CPUs pass over the sub-vectors with a running minimum, and scatter
  integer words; accelerators without a backend of their own replace the passes
  by one fused reduction.
- `hopper`: NVIDIA Hopper and later have kernels for nearest centroids,
  Hartigan's rule and sums, if a codebook fits into shared memory.
- `tpu`: TPUs have kernels for nearest centroids and for sums, both by matrix
  products.
"""
