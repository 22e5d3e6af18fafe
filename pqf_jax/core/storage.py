"""How a packed file stores the numbers of a network: the types of its parts."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from pqf_jax import errors

CHOICES = {"codebook": ("float16", "int8"), "rest": ("float32", "float16")}
_WEIGHT = re.compile(r"params/.*|(.*/)?(kernel|embedding)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Storage:
  """The types in which a packed file stores what it may round.

  The defaults are the paper's. Loading gives every variable its own type back.

  Attributes:
    codebook: 'float16' or 'int8', times a power of two for each codebook.
    rest: 'float32', as it is, or 'float16' for weights that stay dense and
      folded norms; see `rounds`.

  Raises:
    InputError: a type that is none of these.
  """

  codebook: str = "float16"
  rest: str = "float32"

  def __post_init__(self) -> None:
    for name, names in CHOICES.items():
      value = getattr(self, name)
      if not isinstance(value, str) or value not in names:
        raise errors.InputError(
          f"Storage has {name}={value!r}; give {' or '.join(map(repr, names))}"
        )

  @property
  def codebook_itemsize(self) -> int:
    """Returns the bytes of one number of a codebook."""
    return jnp.dtype(self.codebook).itemsize

  def rounds(self, path: str, leaf: Any) -> bool:
    """Returns whether a variable that stays dense is stored as float16.

    So are float32 weights: what Linen trains, and kernels by their name. All
    else stays as it is: of a mean far from zero a small error is a large one of
    what its layer returns, and nothing is known of counters and tables.
    """
    return (
      self.rest == "float16"
      and leaf.dtype == jnp.float32
      and _WEIGHT.fullmatch(path) is not None
    )


PAPER = Storage()


def check(storage: Any) -> None:
  """Refuses what is no `Storage`.

  Raises:
    InputError: names it.
  """
  if not isinstance(storage, Storage):
    raise errors.InputError(
      f"storage is {storage!r}; give pqf_jax.Storage(codebook=..., rest=...)"
    )
