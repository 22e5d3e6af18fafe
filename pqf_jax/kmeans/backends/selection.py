"""What a step of k-means sums up, by platform.

A step needs of every cluster the sum of its sub-vectors, of their squared
norms, and their number. All are summed in integers
(`pqf_jax.numerics.segments`), so that neither the order nor the number of
devices matters. A form is how one platform gets them:

- CPUs: passes with a running minimum, a scatter of integer words
  (`forms.scattered`).
- NVIDIA Hopper and later: kernels for nearest centroids, transfers and sums, if
  a codebook fits into shared memory (`forms.hopper`).
- TPUs: kernels for nearest centroids and sums, which are a matrix product too
  (`forms.tpu`).
- other accelerators: one fused reduction, a scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax import lax

from pqf_jax.kmeans.backends import (
  base,
  hopper,
  hopper_nearest,
  hopper_sums,
  portable,
  tpu,
  tpu_kernels,
)


def by_platform(
  run: Callable[..., base.Tree],
  *arguments: base.Tree,
  length: int,
  num_codes: int,
  most_rows: int,
) -> base.Tree:
  """Returns `run(form, *arguments)` with the form of the platform.

  Args:
    run: traced once a platform that the program may be compiled for.
    *arguments: trees of arrays.
    length: D.
    num_codes: K.
    most_rows: of the layer that has most, padding included, on a device.
  """
  forms = {"cpu": portable.SCATTERED, "default": portable.SCATTERED}
  if most_rows <= tpu_kernels.MOST_ROWS:
    forms["tpu"] = tpu.PRODUCTS
  if (
    hopper_nearest.is_available()
    and hopper_nearest.fits(length, num_codes)
    and hopper_sums.fits(length + 2, num_codes)
  ):
    by_kernel = hopper_nearest.fits(length + 1, num_codes)
    forms["cuda"] = hopper.KERNELS if by_kernel else hopper.TWO_KERNELS
  runs = {name: functools.partial(run, form) for name, form in forms.items()}
  return lax.platform_dependent(*arguments, **runs)
