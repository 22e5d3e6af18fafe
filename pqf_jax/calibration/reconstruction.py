"""Chooses codes and codebook of a kernel by the error of the layer's outputs.

The outputs of a layer are X W with its inputs X. With H = X^T X the squared
error of a quantized kernel Q is tr((W - Q)^T H (W - Q)), in which errors of
different sub-vectors can cancel. Codes are chosen block after block, so that
the blocks after it make up for the error of each (GPTQ, arXiv 2210.17323; with
vectors, arXiv 2402.15319). Then codebook and codes are improved in turns, as in
k-means, but by this error.

Axis letters beyond those of `core.blocks`: G groups of a grouped convolution (1
for other layers), O = C_out / G output channels of a group, n = M * D.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg
from jax.scipy.sparse import linalg as iterative

from pqf_jax.calibration import programs
from pqf_jax.numerics import segments

_SUM = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
# Of the conjugate gradients for a codebook, which start from the one before.
_ITERATIONS = 6
# Of a codeword's mean curvature: the least that any direction of it counts.
_LEAST_SHARE = 1e-4


class InputMoments(NamedTuple):
  """Second moments of a layer's inputs.

  Attributes:
    gram: [G, n, n], X^T X with the inputs X of the quantized network.
    missing: [G, n, O], X^T (Z - X) W with the inputs Z of the dense network
      and its kernel W: what the outputs lack before W is quantized.
  """

  gram: jax.Array
  missing: jax.Array


class Reconstruction(NamedTuple):
  """Result of `reconstruct`.

  Attributes:
    codebook: [K, D].
    codes: int32 [G, O, M].
    error_before: squared error of the layer's outputs over their square, with
      the codebook and the codes that were given.
    error: the same with the new ones.
  """

  codebook: jax.Array
  codes: jax.Array
  error_before: jax.Array
  error: jax.Array


def input_moments(
  quantized: jax.Array, dense: jax.Array, kernel: jax.Array
) -> InputMoments:
  """Returns the moments of input rows of both networks.

  Args:
    quantized: [positions, G, n].
    dense: the same positions.
    kernel: [G, O, n], the dense kernel as sub-vectors in a row.
  """
  lacking = _SUM("pgi,goi->pgo", dense - quantized, kernel)
  return InputMoments(
    _SUM("pgi,pgj->gij", quantized, quantized),
    _SUM("pgi,pgo->gio", quantized, lacking),
  )


def reconstruct(
  moments: InputMoments,
  kernel: jax.Array,
  codebook: jax.Array,
  codes: jax.Array,
  *,
  rounds: int,
  damping: float,
) -> Reconstruction:
  """Chooses the codes and the codebook of one kernel.

  Args:
    moments: of the layer's inputs.
    kernel: [G, O, n], the dense kernel as sub-vectors in a row.
    codebook: [K, D], where the search begins.
    codes: [G, O, M] integer, for `error_before`.
    rounds: how often the codes are improved after their first choice.
    damping: share of the mean of H's diagonal that is added to it.
  """
  length = codebook.shape[1]
  gram, target, triangle = _prepare(moments, kernel, damping, length=length)
  before = codebook, codes
  for matrix in (triangle, *[gram] * rounds):
    codes = _choose_codes(matrix, target, codebook, codes)
    codebook = _fit_codebook(gram, target, codebook, codes)
  errors = _errors(gram, target, (before, (codebook, codes)))
  return Reconstruction(codebook, codes, *errors)


@programs.jit
def mean_vectors(
  vectors: jax.Array, codes: jax.Array, codebook: jax.Array
) -> jax.Array:
  """Returns the mean of the sub-vectors of each code, [K, D].

  Args:
    vectors: [C_out, M, D].
    codes: [C_out, M].
    codebook: [K, D], what codewords stay that no code uses.
  """
  num_codes, length = codebook.shape
  rows = vectors.reshape(-1, length)
  ones = jnp.ones((len(rows), 1), rows.dtype)
  sums, counts = (
    segments.segment_sum(x, codes.reshape(-1), num_codes) for x in (rows, ones)
  )
  return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), codebook)


@functools.partial(programs.jit, static_argnames="length")
def _prepare(
  moments: InputMoments, kernel: jax.Array, damping: float, *, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns H with damping, the kernel to quantize, and H's triangle.

  With H = F^T F and F lower triangular, the triangle's rows of a sub-vector are
  those of F, from the left times the transpose of F's block at the diagonal.
  """
  groups, _, size = kernel.shape
  mean = jnp.trace(moments.gram, axis1=1, axis2=2) / size
  # A layer whose inputs are all 0 may have any kernel.
  ridge = jnp.where(mean > 0, damping * mean, 1.0)
  gram = moments.gram + ridge[:, None, None] * jnp.eye(size)[None]
  # Of the entries in reverse, since Cholesky's factor comes from the left.
  factor = jax.vmap(jnp.linalg.cholesky)(gram[:, ::-1, ::-1])
  solve = jax.vmap(lambda lower, b: linalg.cho_solve((lower, True), b))
  # The kernel whose outputs, from the inputs of the quantized network, come
  # nearest to those of the dense one.
  moved = solve(factor, moments.missing[:, ::-1])[:, ::-1]
  target = kernel + jnp.swapaxes(moved, 1, 2)
  lower = jnp.swapaxes(factor, 1, 2)[:, ::-1, ::-1]
  rows = lower.reshape(groups, -1, length, size)
  own = jnp.diagonal(
    rows.reshape(groups, -1, length, size // length, length), axis1=1, axis2=3
  )
  triangle = _SUM("gdem,gmdn->gmen", own, rows)
  return gram, target, triangle.reshape(gram.shape)


@programs.jit
def _errors(
  gram: jax.Array,
  target: jax.Array,
  found: Sequence[tuple[jax.Array, jax.Array]],
) -> list[jax.Array]:
  """Returns the error of each codebook with its codes."""

  def square(kernel: jax.Array) -> jax.Array:
    return jnp.sum(_SUM("goi,gij->goj", kernel, gram) * kernel)

  whole = square(target)
  return [square(target - _decode(*each)) / whole for each in found]


@programs.jit
def _choose_codes(
  matrix: jax.Array, target: jax.Array, codebook: jax.Array, codes: jax.Array
) -> jax.Array:
  """Chooses each code again, block after block, given the others.

  Args:
    matrix: [G, n, n]: H, and all others of the output channel count as they
      are; or its triangle, and those that follow count as free to make up for
      the error, whatever their codes are.
    target: [G, O, n], the kernel to quantize.
    codebook: [K, D].
    codes: int32 [G, O, M].
  """
  length = codebook.shape[1]

  def step(m: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    missing, codes = carry
    rows = lax.dynamic_slice_in_dim(matrix, m * length, length, 1)  # [G, D, n]
    own = lax.dynamic_slice_in_dim(rows, m * length, length, 2)
    before = codebook[lax.dynamic_index_in_dim(codes, m, 2, keepdims=False)]
    # With codeword c the error is c' own c - 2 c' pull, and a constant.
    pull = _SUM("gdn,gon->god", rows, missing) + _SUM(
      "gde,goe->god", own, before
    )
    squares = _SUM("gkd,kd->gk", _SUM("kd,gde->gke", codebook, own), codebook)
    chosen = jnp.argmin(
      squares[:, None] - 2 * _SUM("god,kd->gok", pull, codebook), 2
    )
    block = lax.dynamic_slice_in_dim(missing, m * length, length, 2)
    missing = lax.dynamic_update_slice_in_dim(
      missing, block + before - codebook[chosen], m * length, 2
    )
    return missing, lax.dynamic_update_index_in_dim(codes, chosen, m, 2)

  missing = target - _decode(codebook, codes)
  return lax.fori_loop(0, codes.shape[2], step, (missing, codes))[1]


@programs.jit
def _fit_codebook(
  gram: jax.Array, target: jax.Array, codebook: jax.Array, codes: jax.Array
) -> jax.Array:
  """Lowers the error over the codebook alone, a linear least-squares problem.

  Codewords that no code uses stay as they are.
  """
  num_codes, length = codebook.shape

  def collect(kernel: jax.Array) -> jax.Array:
    vectors = kernel.reshape(-1, length)
    return segments.segment_sum(vectors, codes.reshape(-1), num_codes)

  def curvature(codebook: jax.Array) -> jax.Array:
    return collect(_SUM("goi,gij->goj", _decode(codebook, codes), gram))

  fitted, _ = iterative.cg(
    curvature,
    collect(_SUM("goi,gij->goj", target, gram)),
    x0=codebook,
    maxiter=_ITERATIONS,
    M=functools.partial(
      _SUM, "kde,ke->kd", _inverse_curvatures(gram, codes, num_codes, length)
    ),
  )
  return fitted


def _inverse_curvatures(
  gram: jax.Array, codes: jax.Array, num_codes: int, length: int
) -> jax.Array:
  """Returns [K, D, D], about the inverse for each codeword alone.

  Products of two sub-vectors with the same code are left out.
  """
  groups, _, num_blocks = codes.shape
  places = jnp.arange(groups * num_blocks).reshape(groups, 1, num_blocks)
  uses = jnp.zeros((num_codes, groups * num_blocks), jnp.int32)
  uses = uses.at[codes, places].add(1).astype(jnp.float32)
  own = jnp.diagonal(
    gram.reshape(groups, num_blocks, length, num_blocks, length),
    axis1=1,
    axis2=3,
  )
  own = jnp.moveaxis(own, 3, 1).reshape(-1, length * length)
  curvatures = _SUM("km,mi->ki", uses, own).reshape(-1, length, length)
  mean = jnp.trace(curvatures, axis1=1, axis2=2) / length
  # So that float32 keeps the inverse positive; of codewords without a use 1.
  ridge = jnp.where(mean > 0, _LEAST_SHARE * mean, 1.0)
  return jnp.linalg.inv(
    curvatures + ridge[:, None, None] * jnp.eye(length)[None]
  )


def _decode(codebook: jax.Array, codes: jax.Array) -> jax.Array:
  return codebook[codes].reshape(*codes.shape[:2], -1)
