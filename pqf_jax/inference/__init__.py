"""Applies compressed networks: at the speed of dense ones, or in less memory.

- `make_apply`: a network made ready in one of the `FORMS`.
- `product`: activations times one kernel, straight from its codes.

The modules, in the order of reading:

- `products`: the product by tables, by blocks, and on each platform.
- `hopper`: its kernel for NVIDIA Hopper; `hopper_source` writes the program.
- `kernels`: a kernel that a program reads without decoding it.
- `readers`: equations that become products.
- `apply`: runs the network's program with such kernels.
"""

from pqf_jax.inference.apply import FORMS as FORMS
from pqf_jax.inference.apply import Applied as Applied
from pqf_jax.inference.apply import make_apply as make_apply
from pqf_jax.inference.products import product as product
