"""Compression plans made from rules, and the size of the result in bytes.

A plan is made from shapes alone, so that every mistake in the rules and the
size of the result are known before any work.
"""

import difflib
import math
import numbers
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import storage as storages

PyTree = Any
_MIN_VECTORS_PER_CODE = 4
MOST = 10**6  # of k-means steps, and of channels that share a sub-vector
# Paths of a norm's scale, bias, mean and variance.
NORM = (
  "params/{}/scale",
  "params/{}/bias",
  "batch_stats/{}/mean",
  "batch_stats/{}/var",
)
_KERNEL = re.compile(r"(.*/)?(kernel|embedding)")


class Rule(NamedTuple):
  """How to compress the kernels whose path matches; the first match wins.

  Attributes:
    pattern: regular expression that must match the whole path, such as
      `params/layer1/0/conv1/kernel`.
    num_codes: codewords wanted; `make_plan` takes the next power of two below,
      or fewer for small kernels. None keeps the kernel dense.
    channels: input channels that share a sub-vector.
    kmeans_steps: k-means steps.
  """

  pattern: str
  num_codes: int | None
  channels: int = 1
  kmeans_steps: int = 1000


class LayerPlan(NamedTuple):
  """How to compress one kernel.

  Attributes:
    spec: the layout of its sub-vectors.
    num_codes: K after the clamp, a power of two.
    kmeans_steps: k-means steps.
  """

  spec: blocks.BlockSpec
  num_codes: int
  kmeans_steps: int


CompressionPlan = Mapping[str, LayerPlan]
"""{path: LayerPlan} in the order of the tree; an absent path stays dense."""


class LayerSize(NamedTuple):
  """The packed size of one variable.

  Attributes:
    path: of the variable.
    shape: dense shape.
    length: D, or 0 where the variable stays dense.
    num_codes: K, or 0.
    num_subvectors: N, or 0.
    payload_bytes: bytes of this variable in the packed file.
  """

  path: str
  shape: tuple[int, ...]
  length: int
  num_codes: int
  num_subvectors: int
  payload_bytes: int

  @property
  def bits_per_weight(self) -> float:
    """Returns the packed bits for each entry of the dense variable."""
    return 8 * self.payload_bytes / math.prod(self.shape)


class SizeReport(NamedTuple):
  """Size of the packed file, without its header.

  Attributes:
    layers: one row for each stored variable.
    payload_bytes: codes + codebooks + the rest, in the types of a `Storage`.
    dense_bytes: the same variables in float32, norms folded as well.
  """

  layers: tuple[LayerSize, ...]
  payload_bytes: int
  dense_bytes: int

  @property
  def ratio(self) -> float:
    """Returns how many times smaller the packed network is."""
    return self.dense_bytes / self.payload_bytes


def make_plan(rules: Sequence[Rule], variables: PyTree) -> CompressionPlan:
  """Resolves the rules against a variable tree.

  A kernel is a leaf named `kernel` or `embedding` of rank 2 or more. The
  variables may be `jax.ShapeDtypeStruct`s.

  Returns:
    The plan; K = 2^floor(log2(min(num_codes, N / 4))): a code has whole bits,
    and codebooks of small layers do not cost more than the layer itself
    (section 4 of the paper). A `num_codes` that is no power of two warns.

  Raises:
    InputError: the tree has no kernel, no rule covers a kernel, a rule covers
      no kernel, a pattern is not a regular expression, or a kernel is not of
      floats or does not fit the rule's block.
  """
  if (
    not isinstance(rules, Collection)
    or isinstance(rules, Rule)
    or not all(isinstance(rule, Rule) for rule in rules)
  ):
    raise errors.InputError(
      f"rules is {rules!r}; give a list of pqf_jax.Rule, such as "
      "[Rule('.*', num_codes=256)]"
    )
  for rule in rules:
    check_rule(rule)
    power = 1 << int(rule.num_codes or 1).bit_length() - 1
    if rule.num_codes not in (None, power):
      warnings.warn(
        f"rule {rule.pattern!r}: num_codes={rule.num_codes} becomes {power}, "
        "the next power of two below",
        stacklevel=2,
      )
  flat = trees.flatten(variables, vq_array.is_vq)
  kernels = [
    path
    for path, leaf in flat.items()
    if _KERNEL.fullmatch(path) and len(leaf.shape) >= 2
  ]
  if not kernels:
    raise errors.InputError(
      f"the tree has no kernel, only {trees.sample_paths(variables)}; kernels "
      "are leaves of rank 2 or more with the name 'kernel' or 'embedding': "
      "rename the leaves to compress"
    )
  matches = {
    path: [rule for rule in rules if re.fullmatch(rule.pattern, path)]
    for path in kernels
  }
  uncovered = [path for path in kernels if not matches[path]]
  if uncovered:
    raise errors.InputError(
      f"no rule covers {', '.join(uncovered)}; add one, with num_codes=None "
      "to keep the kernel dense"
    )
  unused = set(rules) - {first for first, *_ in matches.values()}
  if unused:
    patterns = sorted(rule.pattern for rule in unused)
    near = difflib.get_close_matches(patterns[0], kernels, n=3, cutoff=0)
    raise errors.InputError(
      f"these rules match no kernel, or only kernels that an earlier rule "
      f"matches: {patterns}; fix, remove or reorder them (kernels with similar "
      f"names: {near})"
    )
  return {
    path: _resolve(path, flat[path], first, first.num_codes)
    for path, (first, *_) in matches.items()
    if first.num_codes is not None
  }


def check_pattern(name: str, pattern: str) -> None:
  """Refuses what is no regular expression.

  Raises:
    InputError: names the setting, the pattern and its fault.
  """
  try:
    re.compile(pattern)
    re.fullmatch(pattern, "")  # bytes would match no text
  except (re.error, TypeError, OverflowError, RecursionError) as error:
    raise errors.InputError(
      f"{name} {pattern!r} is not a regular expression: {error}"
    ) from error


def check_rule(rule: Rule) -> None:
  """Refuses a rule that no kernel could follow.

  Raises:
    InputError: its pattern is not a regular expression, or a number of it is
      out of range.
  """
  check_pattern("rule", rule.pattern)
  num_codes = 2 if rule.num_codes is None else rule.num_codes
  values = (num_codes, rule.channels, rule.kmeans_steps)
  whole = all(isinstance(value, numbers.Integral) for value in values)
  in_range = whole and min(values) >= 1 and max(values) <= MOST
  if not in_range or not 2 <= num_codes <= 65536:
    raise errors.InputError(
      f"rule {rule.pattern!r} has num_codes={rule.num_codes!r}, "
      f"channels={rule.channels!r}, kmeans_steps={rule.kmeans_steps!r}; "
      "num_codes must be 2 to 65536 or None, the others 1 to "
      f"{MOST}, all whole"
    )


def _resolve(path: str, kernel: Any, rule: Rule, num_codes: int) -> LayerPlan:
  shape = tuple(kernel.shape)
  if not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise errors.InputError(
      f"{path} is {kernel.dtype}, but only floats can be quantized; convert it "
      f"or add a rule before {rule.pattern!r} that keeps it (num_codes=None)"
    )
  spec = blocks.BlockSpec(rule.channels)
  try:
    c_out, m, _ = spec.layout(shape)
  except errors.InputError as error:
    raise errors.InputError(
      f"{path}: {error} (rule {rule.pattern!r})"
    ) from error
  most = c_out * m // _MIN_VECTORS_PER_CODE
  if most < 2:
    raise errors.InputError(
      f"{path} of shape {shape} has only {c_out * m} sub-vectors, too few "
      f"for a codebook; add a rule before {rule.pattern!r} that keeps it "
      "dense (num_codes=None)"
    )
  clamped = 1 << int(math.log2(min(num_codes, most)))
  return LayerPlan(spec, clamped, rule.kmeans_steps)


def predict_size(
  plan: CompressionPlan,
  variables: PyTree,
  storage: storages.Storage = storages.PAPER,
) -> SizeReport:
  """Counts the packed bytes: codes, codebooks and the rest.

  The variables may be arrays, `jax.ShapeDtypeStruct`s or `VQArray`s. Statistics
  of norms are not counted if the plan has any kernel: packing then folds mean
  and variance into scale and bias, two vectors a norm, as the published sizes
  count them.
  """
  flat = trees.flatten(variables, vq_array.is_vq)
  norms = foldable_norms(flat).values() if plan else ()
  folded = {path for norm in norms for path in norm[2:]}
  rows = tuple(
    _layer_size(path, leaf, plan.get(path), storage)
    for path, leaf in flat.items()
    if path not in folded
  )
  payload_bytes = sum(row.payload_bytes for row in rows)
  dense_bytes = sum(4 * math.prod(row.shape) for row in rows)
  return SizeReport(rows, payload_bytes, dense_bytes)


def foldable_norms(
  flat: Mapping[str, Any],
) -> dict[str, tuple[str, str, str, str]]:
  """Returns {foldable norm: paths of its (scale, bias, mean, var)}.

  A norm is folded in float32, so only where all four are, and of one shape.
  """
  norms = {}
  for path in flat:
    norm = path.removeprefix("batch_stats/").removesuffix("/mean")
    scale, bias, mean, var = (member.format(norm) for member in NORM)
    members = scale, bias, mean, var
    if path == members[2] and all(
      member in flat
      and flat[member].dtype == jnp.float32
      and flat[member].shape == flat[path].shape
      for member in members
    ):
      norms[norm] = members
  return norms


def code_bits(num_codes: int) -> int:
  """Returns the bits of one code: log2(K), rounded up."""
  return (num_codes - 1).bit_length()


def code_bytes(num_subvectors: int, num_codes: int) -> int:
  """Returns the packed bytes of a kernel's codes: ceil(N * log2(K) / 8)."""
  return math.ceil(num_subvectors * code_bits(num_codes) / 8)


def _layer_size(
  path: str, leaf: Any, layer: LayerPlan | None, storage: storages.Storage
) -> LayerSize:
  shape = tuple(leaf.shape)
  if layer is None:
    itemsize = 2 if storage.rounds(path, leaf) else leaf.dtype.itemsize
    return LayerSize(path, shape, 0, 0, 0, itemsize * math.prod(shape))
  c_out, m, length = layer.spec.layout(shape)
  num_bytes = code_bytes(c_out * m, layer.num_codes)
  num_bytes += storage.codebook_itemsize * layer.num_codes * length
  return LayerSize(path, shape, length, layer.num_codes, c_out * m, num_bytes)


def compressed_shapes(plan: CompressionPlan, variables: PyTree) -> PyTree:
  """Returns the `jax.ShapeDtypeStruct`s that quantizing by a plan gives."""
  flat = trees.flatten(variables)

  def node(path: str) -> vq_array.VQArray:
    shape, layer = tuple(flat[path].shape), plan[path]
    c_out, m, length = layer.spec.layout(shape)
    return vq_array.VQArray(
      jnp.zeros((layer.num_codes, length), jnp.float32),
      jnp.zeros((c_out, m), vq_array.code_dtype(layer.num_codes)),
      shape,
      layer.spec,
    )

  nodes = jax.eval_shape(lambda: {path: node(path) for path in plan})
  return trees.replace(trees.shapes(variables), nodes)


def kmeans_cost(plan: CompressionPlan, variables: PyTree) -> dict[str, int]:
  """Returns {path: multiplications of its k-means}, for dividing the work."""
  flat = trees.flatten(variables)
  return {
    path: math.prod(flat[path].shape) * layer.num_codes * layer.kmeans_steps
    for path, layer in plan.items()
  }
