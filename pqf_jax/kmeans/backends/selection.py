"""Choice of the backend by platform.

A step needs of every cluster the sum of its sub-vectors, of their squared
norms, and their number. All are summed in integers
(`pqf_jax.numerics.segments`), so that neither the order nor the number of
devices matters. The backends are:

- CPUs: passes with a running minimum, a scatter of integer words (`portable`).
- NVIDIA Hopper and later: kernels for nearest centroids, Hartigan's rule and
  sums, if a codebook fits into shared memory (`hopper`).
- TPUs: kernels for nearest centroids and sums, which are a matrix product too
  (`tpu`).
- other accelerators: one fused reduction, a scatter (`portable`).
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
)


def by_platform(
  run: Callable[..., base.Tree],
  *arguments: base.Tree,
  length: int,
  num_codes: int,
  most_rows: int,
) -> base.Tree:
  """Returns `run(backend, *arguments)` with the backend of the platform.

  Args:
    run: traced once for each platform that the program may be compiled for.
    *arguments: trees of arrays.
    length: D.
    num_codes: K.
    most_rows: rows of the largest layer on a device, padding included.
  """
  backends = {"cpu": portable.BACKEND, "default": portable.BACKEND}
  if most_rows <= tpu.MOST_ROWS:
    backends["tpu"] = tpu.BACKEND
  if (
    hopper_nearest.is_available()
    and hopper_nearest.fits(length, num_codes)
    and hopper_sums.fits(length + 2, num_codes)
  ):
    with_norms = hopper_nearest.fits(length + 1, num_codes)
    backends["cuda"] = (
      hopper.BACKEND if with_norms else hopper.BACKEND_WITHOUT_HARTIGAN
    )
  runs = {name: functools.partial(run, each) for name, each in backends.items()}
  return lax.platform_dependent(*arguments, **runs)
