"""How near embeddings are to those of the dense network."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from pqf_jax import errors

PyTree = Any


def make_embed(
  apply_fn: Callable[..., Any],
) -> Callable[[PyTree, Iterable[Mapping[str, np.ndarray]]], np.ndarray]:
  """Builds (variables, batches) -> [N, features], rows of length 1.

  Batches have `tokens` int32 [B, T], and `mask` [B], 0 for rows that are no
  sentences; those are left out.
  """
  apply = jax.jit(apply_fn)

  def embed(
    variables: PyTree, batches: Iterable[Mapping[str, np.ndarray]]
  ) -> np.ndarray:
    parts = [
      np.asarray(apply(variables, batch["tokens"]))[batch["mask"] > 0]
      for batch in batches
    ]
    rows = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(rows).all():
      raise errors.InputError(
        "embeddings are not finite; the weights are damaged, overflow, or "
        "their training diverged: use others"
      )
    return rows / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)[:, None]

  return embed


def compare(embeddings: np.ndarray, dense: np.ndarray) -> dict[str, float]:
  """Returns the figures of unit vectors [N, features] beside the dense ones.

  `cosine` and `worst` are the mean and the least cosine of an embedding to the
  dense one; `nearest` is the share of sentences whose nearest other sentence is
  that of the dense network.
  """
  cosines = (embeddings * dense).sum(1)
  return {
    "cosine": float(cosines.mean()),
    "worst": float(cosines.min()),
    "nearest": float(np.mean(_nearest(embeddings) == _nearest(dense))),
    "images": len(dense),
  }


def _nearest(embeddings: np.ndarray) -> np.ndarray:
  """Returns the number of the other sentence that is nearest to each."""
  cosines = embeddings @ embeddings.T
  np.fill_diagonal(cosines, -np.inf)
  return cosines.argmax(1)
