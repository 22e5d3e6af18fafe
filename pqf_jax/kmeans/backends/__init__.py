"""The functions by which each platform takes a step of k-means.

- `base`: the interface, `Backend`.
- `selection`: chooses the backend of the platform.
- `portable`: CPUs, and accelerators without a backend of their own.
- `hopper`, with the kernels `hopper_nearest` and `hopper_sums`: NVIDIA GPUs.
- `tpu`: TPUs.
"""
