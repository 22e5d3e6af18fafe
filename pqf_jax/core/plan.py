"""What will be compressed and how: rules -> plan, with its size in bytes.

A plan is made of shapes alone, so that every mistake in the rules and the size
of the result are known before any work.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array

PyTree = Any
MIN_POINTS_PER_CODE = 4
KERNEL = re.compile(r"(.*/)?(kernel|embedding)")


class Rule(NamedTuple):
  """How the kernels whose path matches are compressed; the first match wins.

  Attributes:
    pattern: regular expression that must match the whole path, such as
      `params/layer1/0/conv1/kernel`.
    num_codes: codewords wanted (K before the clamp), or None: stays dense.
    channels: input channels that share a sub-vector.
    kmeans_steps: k-means steps.
  """

  pattern: str
  num_codes: int | None
  channels: int = 1
  kmeans_steps: int = 1000


class LayerPlan(NamedTuple):
  """How one kernel is compressed.

  Attributes:
    spec: how it is cut into sub-vectors.
    num_codes: K after the clamp, a power of two.
    kmeans_steps: k-means steps.
  """

  spec: blocks.BlockSpec
  num_codes: int
  kmeans_steps: int


CompressionPlan = Mapping[str, LayerPlan]
"""{path: LayerPlan} in the order of the tree; an absent path stays dense."""


class LayerSize(NamedTuple):
  """Where the bytes of one variable go once packed.

  Attributes:
    path: of the variable.
    shape: dense shape.
    block: D, or 0 where the variable stays dense.
    num_codes: K, or 0.
    codes: N, or 0.
    payload_bytes: of the packed file, for this variable.
  """

  path: str
  shape: tuple[int, ...]
  block: int
  num_codes: int
  codes: int
  payload_bytes: int

  @property
  def bits_per_weight(self) -> float:
    """Of the dense variable."""
    return 8 * self.payload_bytes / math.prod(self.shape)


class SizeReport(NamedTuple):
  """Bytes of the packed file, counted without its header.

  Attributes:
    layers: one row a variable that is stored.
    payload_bytes: codes + float16 codebooks + float32 rest.
    dense_bytes: the same network in float32, norms folded as well.
  """

  layers: tuple[LayerSize, ...]
  payload_bytes: int
  dense_bytes: int

  @property
  def ratio(self) -> float:
    """How many times smaller."""
    return self.dense_bytes / self.payload_bytes


def make_plan(rules: Sequence[Rule], variables: PyTree) -> CompressionPlan:
  """Resolves the rules against a variable tree.

  A kernel is a leaf named `kernel` or `embedding` of rank 2 or more.

  Args:
    rules: the first that matches a kernel's whole path decides.
    variables: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    The plan; K = min(num_codes, 2^floor(log2(N / 4))), so that codes of small
    layers do not cost more than the layer itself (section 4 of the paper).

  Raises:
    InputError: a kernel that no rule covers, a rule that covers nothing, a bad
      pattern, or a layer that the rule's block does not fit.
  """
  kernels = {
    path: tuple(leaf.shape)
    for path, leaf in trees.flatten(variables, vq_array.is_vq).items()
    if KERNEL.fullmatch(path) and len(leaf.shape) >= 2
  }
  for rule in rules:
    _check_rule(rule)
  chosen = {path: _first_match(rules, path) for path in kernels}
  uncovered = [path for path, rule in chosen.items() if rule is None]
  if uncovered:
    raise errors.InputError(
      f"no rule covers {', '.join(uncovered)}; add one, with num_codes=None "
      "where the kernel is to stay dense"
    )
  unused = set(rules) - set(chosen.values())
  if unused:
    patterns = sorted(rule.pattern for rule in unused)
    near = difflib.get_close_matches(patterns[0], kernels, n=3, cutoff=0)
    raise errors.InputError(
      f"rules that decide for no kernel: {patterns}; mend or remove them, or "
      f"move them before a rule that matches first (kernels near: {near})"
    )
  return {
    path: _resolve(path, kernels[path], rule)
    for path, rule in chosen.items()
    if rule.num_codes is not None
  }


def _check_rule(rule: Rule) -> None:
  try:
    re.compile(rule.pattern)
  except re.error as error:
    raise errors.InputError(
      f"rule {rule.pattern!r} is not a regular expression: {error}"
    ) from error
  numbers = (rule.num_codes or 2, rule.channels, rule.kmeans_steps)
  if min(numbers) < 1 or rule.num_codes == 1 or (rule.num_codes or 0) > 65536:
    raise errors.InputError(
      f"rule {rule.pattern!r} has num_codes={rule.num_codes}, "
      f"channels={rule.channels}, kmeans_steps={rule.kmeans_steps}; "
      "num_codes must be 2 to 65536 or None, the others at least 1"
    )


def _first_match(rules: Sequence[Rule], path: str) -> Rule | None:
  matches = (rule for rule in rules if re.fullmatch(rule.pattern, path))
  return next(matches, None)


def _resolve(path: str, shape: tuple[int, ...], rule: Rule) -> LayerPlan:
  spec = blocks.BlockSpec(rule.channels)
  try:
    c_out, m, _ = spec.layout(shape)
  except errors.InputError as error:
    raise errors.InputError(
      f"{path}: {error} (rule {rule.pattern!r})"
    ) from error
  most = c_out * m // MIN_POINTS_PER_CODE
  if most < 2:
    raise errors.InputError(
      f"{path} of shape {shape} has only {c_out * m} sub-vectors, too few "
      f"for a codebook; add a rule before {rule.pattern!r} that keeps it "
      "dense (num_codes=None)"
    )
  num_codes = 1 << int(math.log2(min(rule.num_codes, most)))
  return LayerPlan(spec, num_codes, rule.kmeans_steps)


def predict_size(plan: CompressionPlan, variables: PyTree) -> SizeReport:
  """Counts the packed bytes: codes, float16 codebooks, the rest in float32.

  Statistics of norms are not counted: packing folds mean and variance into
  scale and bias, two vectors a norm, as the published sizes count them.

  Args:
    plan: what is compressed.
    variables: arrays, `jax.ShapeDtypeStruct`s or `VQArray`s.
  """
  flat = trees.flatten(variables, vq_array.is_vq)
  folded = {path for norm in foldable_norms(flat).values() for path in norm[2:]}
  rows = tuple(
    _layer_size(path, tuple(leaf.shape), plan.get(path))
    for path, leaf in flat.items()
    if path not in folded
  )
  payload_bytes = sum(row.payload_bytes for row in rows)
  dense_bytes = sum(4 * math.prod(row.shape) for row in rows)
  return SizeReport(rows, payload_bytes, dense_bytes)


def foldable_norms(flat: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
  """The norms whose mean and variance can go into scale and bias.

  Args:
    flat: variables by path.

  Returns:
    {path of the norm: paths of its (scale, bias, mean, var)}.
  """
  means = re.compile(r"batch_stats/(.*)/mean")
  found = {}
  for match in filter(None, map(means.fullmatch, flat)):
    norm = match[1]
    members = (
      f"params/{norm}/scale",
      f"params/{norm}/bias",
      f"batch_stats/{norm}/mean",
      f"batch_stats/{norm}/var",
    )
    if all(path in flat for path in members):
      found[norm] = members
  return found


def code_bits(num_codes: int) -> int:
  """Bits of one code: log2(K), rounded up."""
  return (num_codes - 1).bit_length()


def code_bytes(num_vectors: int, num_codes: int) -> int:
  """Bytes of the packed codes of one kernel: ceil(N * log2(K) / 8)."""
  return math.ceil(num_vectors * code_bits(num_codes) / 8)


def _layer_size(
  path: str, shape: tuple[int, ...], layer: LayerPlan | None
) -> LayerSize:
  if layer is None:
    return LayerSize(path, shape, 0, 0, 0, 4 * math.prod(shape))
  c_out, m, block = layer.spec.layout(shape)
  num_bytes = code_bytes(c_out * m, layer.num_codes)
  num_bytes += 2 * layer.num_codes * block
  return LayerSize(path, shape, block, layer.num_codes, c_out * m, num_bytes)


def compressed_shapes(plan: CompressionPlan, variables: PyTree) -> PyTree:
  """The tree of `jax.ShapeDtypeStruct`s that quantizing by this plan gives."""
  flat = trees.flatten(variables)

  def node(path: str, layer: LayerPlan) -> vq_array.VQArray:
    shape = tuple(flat[path].shape)
    c_out, m, block = layer.spec.layout(shape)
    codes = vq_array.code_dtype(layer.num_codes)
    return vq_array.VQArray(
      jax.ShapeDtypeStruct((layer.num_codes, block), jnp.float32),
      jax.ShapeDtypeStruct((c_out, m), codes),
      shape,
      layer.spec,
    )

  nodes = {path: node(path, layer) for path, layer in plan.items()}
  return trees.replace(trees.shapes(variables), nodes)


def kmeans_cost(plan: CompressionPlan, variables: PyTree) -> dict[str, int]:
  """{path: multiplications of its k-means}, to divide the work by."""
  flat = trees.flatten(variables)
  return {
    path: math.prod(flat[path].shape) * layer.num_codes * layer.kmeans_steps
    for path, layer in plan.items()
  }


def to_json(plan: CompressionPlan) -> str:
  """The plan as text; `from_json` undoes it."""
  return json.dumps(
    {
      path: dict(layer._asdict(), spec=vars(layer.spec))
      for path, layer in plan.items()
    }
  )


def from_json(text: str) -> CompressionPlan:
  """The plan of which `to_json` made this text."""
  return {
    path: LayerPlan(**dict(fields, spec=blocks.BlockSpec(**fields["spec"])))
    for path, fields in json.loads(text).items()
  }
