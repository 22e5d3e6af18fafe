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
import numpy as np

from pqf_jax import errors
from pqf_jax.core import blocks, modules, trees, vq_array
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
_NAMED = re.compile(r"(.*/)?(kernel|embedding)")
_FLOATS = ("bfloat16", "float16", "float32", "float64")


class Rule(NamedTuple):
  """How to compress the kernels whose path matches; the first match wins.

  Attributes:
    pattern: regular expression that must match the whole path, such as
      `params/layer1/0/conv1/kernel`.
    num_codes: codewords wanted; `make_plan` takes the next power of two below,
      or fewer for small kernels. None keeps the kernel dense.
    channels: input channels that share a sub-vector.
    kmeans_steps: k-means steps.
    axes: what the axes of the kernel are for, where discovery cannot tell or
      should not decide; the rule then also takes leaves that are no kernels by
      themselves.
  """

  pattern: str
  num_codes: int | None
  channels: int = 1
  kmeans_steps: int = 1000
  axes: blocks.KernelAxes | None = None


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
    return 8 * self.payload_bytes / max(1, math.prod(self.shape))


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


def make_plan(
  rules: Sequence[Rule],
  variables: PyTree,
  kernels: Mapping[str, blocks.KernelAxes] | None = None,
) -> CompressionPlan:
  """Resolves the rules against a variable tree.

  Args:
    rules: the first rule that matches a kernel's path decides about it.
    variables: variable tree, maybe of `jax.ShapeDtypeStruct`s.
    kernels: {path: axes} as `pqf_jax.find_kernels` reads them from the network.
      None goes by names: a leaf `kernel` of rank 2 or more is `[..., in, out]`,
      a leaf `embedding` is `[..., tokens, features]`, and nothing is stacked.

  Returns:
    The plan; K = 2^floor(log2(min(num_codes, N / 4))): a code has whole bits,
    and codebooks of small layers do not cost more than the layer itself
    (section 4 of the paper). A `num_codes` that is no power of two warns.

  Raises:
    InputError: the tree has no kernel, no rule covers a kernel, a rule covers
      no kernel, a pattern is not a regular expression, or a kernel is not of
      floats or does not fit the rule's block or axes.
  """
  _check_rules(rules)
  flat = trees.flatten(variables, vq_array.is_vq)
  found = _named_kernels(flat) if kernels is None else kernels
  first = {
    path: rule
    for path in flat
    if (rule := next((r for r in rules if re.fullmatch(r.pattern, path)), None))
  }
  axes = {
    path: chosen
    for path in flat
    if (chosen := (path in first and first[path].axes) or found.get(path))
  }
  _check_coverage(rules, flat, first, axes)
  for path in axes.keys() & modules.bare_arrays(variables):
    if first[path].num_codes is not None:
      raise errors.InputError(
        f"{path} is a bare array of an NNX module, where no compressed kernel "
        "can be; hold it in an nnx.Param, or keep it dense (num_codes=None)"
      )
  return {
    path: _resolve(path, flat[path], first[path], axes[path])
    for path in axes
    if first[path].num_codes is not None
  }


def _check_rules(rules: Any) -> None:
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
        stacklevel=3,
      )


def _named_kernels(flat: Mapping[str, Any]) -> dict[str, blocks.KernelAxes]:
  """Returns the kernels by name, and what the last two axes of each are for."""
  found = {}
  for path, leaf in flat.items():
    match, rank = _NAMED.fullmatch(path), np.ndim(leaf)
    if match and rank >= 2:
      ends = (rank - 2,), (rank - 1,)
      found[path] = blocks.KernelAxes(
        *(ends if match[2] == "kernel" else ends[::-1])
      )
  return found


def _check_coverage(
  rules: Collection[Rule],
  flat: Mapping[str, Any],
  first: Mapping[str, Rule],
  kernels: Collection[str],
) -> None:
  """Refuses kernels without a rule, and rules without a kernel."""
  if not kernels:
    raise errors.InputError(
      "the tree has no kernel, only "
      f"{', '.join(list(flat)[:5])}; kernels are what a matrix product, "
      "convolution or lookup of the network reads (pqf_jax.find_kernels), or "
      "without a network the leaves of rank 2 or more with the name 'kernel' "
      "or 'embedding': name the axes of others by Rule(..., axes=...)"
    )
  uncovered = [path for path in kernels if path not in first]
  if uncovered:
    raise errors.InputError(
      f"no rule covers {', '.join(uncovered)}; add one, with num_codes=None "
      "to keep the kernel dense"
    )
  unused = set(rules) - {first[path] for path in kernels}
  if not unused:
    return
  patterns = sorted(rule.pattern for rule in unused)
  others = [path for path in flat if first.get(path) in unused]
  if others:
    raise errors.InputError(
      f"rule {first[others[0]].pattern!r} matches {others[0]} of shape "
      f"{np.shape(flat[others[0]])}, but no matrix product, convolution or "
      "lookup reads it as a kernel; remove the rule, or say what its axes are "
      "for by Rule(..., axes=pqf_jax.KernelAxes(inputs, outputs))"
    )
  near = difflib.get_close_matches(patterns[0], kernels, n=3, cutoff=0)
  raise errors.InputError(
    f"these rules match no kernel, or only kernels that an earlier rule "
    f"matches: {patterns}; fix, remove or reorder them (kernels with similar "
    f"names: {near})"
  )


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
  if rule.axes is not None and not (
    isinstance(rule.axes, blocks.KernelAxes)
    and all(
      isinstance(part, tuple) and all(type(axis) is int for axis in part)
      for part in rule.axes
    )
  ):
    raise errors.InputError(
      f"rule {rule.pattern!r} has axes={rule.axes!r}; give "
      "pqf_jax.KernelAxes(inputs, outputs, stacked), three tuples of axes such "
      "as KernelAxes((1,), (0,))"
    )


def _resolve(
  path: str, kernel: Any, rule: Rule, axes: blocks.KernelAxes
) -> LayerPlan:
  shape = tuple(kernel.shape)
  if str(kernel.dtype) not in _FLOATS:
    raise errors.InputError(
      f"{path} is {kernel.dtype}, but only floats of 16 to 64 bits can be "
      f"quantized; convert it or add a rule before {rule.pattern!r} that keeps "
      "it (num_codes=None)"
    )
  _check_axes(f"{path} of shape {shape}", axes, len(shape))
  spec = blocks.make_spec(rule.channels, axes, len(shape))
  try:
    c_out, m, _ = spec.layout(spec.layer_shape(shape))
  except errors.InputError as error:
    raise errors.InputError(
      f"{path}: {error} (rule {rule.pattern!r})"
    ) from error
  most = c_out * m // _MIN_VECTORS_PER_CODE
  if most < 2:
    raise errors.InputError(
      f"{path} of shape {shape} has only {c_out * m} sub-vectors a codebook, "
      f"too few for one; add a rule before {rule.pattern!r} that keeps it "
      "dense (num_codes=None)"
    )
  clamped = 1 << int(math.log2(min(int(rule.num_codes or 0), most)))
  return LayerPlan(spec, clamped, rule.kmeans_steps)


def _check_axes(name: str, axes: blocks.KernelAxes, rank: int) -> None:
  every = (*axes.inputs, *axes.outputs, *axes.stacked)
  inside = all(0 <= axis < rank for axis in every)
  if not inside or len(set(every)) < len(every) or not axes.inputs:
    raise errors.InputError(
      f"{name} has axes {axes}; name one input axis or more, and each axis "
      f"once, from 0 to {rank - 1}"
    )
  start, *_ = (*axes.stacked, 0)
  run = tuple(range(start, start + len(axes.stacked)))
  if axes.stacked != run or start > blocks.LAST_STACK_AXIS:
    raise errors.InputError(
      f"{name} is stacked along axes {axes.stacked}; stack layers along "
      f"neighbouring axes that begin at 0 to {blocks.LAST_STACK_AXIS}, or keep "
      "it dense (num_codes=None)"
    )


def predict_size(
  plan: CompressionPlan,
  variables: PyTree,
  storage: storages.Storage = storages.PAPER,
) -> SizeReport:
  """Counts the packed bytes: codes, codebooks and the rest.

  The variables may be arrays, `jax.ShapeDtypeStruct`s or `VQArray`s. Statistics
  of norms are not counted if the plan has any kernel: packing then folds mean
  and variance into scale and bias, two vectors a norm, as the published sizes
  count them. Random keys, as modules may have, are in no file.

  Raises:
    InputError: the storage is none, or two leaves have the same path.
  """
  storages.check(storage)
  flat = trees.flatten(variables, vq_array.is_vq)
  norms = foldable_norms(flat).values() if plan else ()
  folded = {path for norm in norms for path in norm[2:]}
  rows = tuple(
    _layer_size(path, leaf, plan.get(path), storage)
    for path, leaf in flat.items()
    if path not in folded and not trees.is_random_key(leaf)
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
  c_out, m, length = layer.spec.layout(layer.spec.layer_shape(shape))
  count = math.prod(layer.spec.stack_shape(shape))
  num_subvectors = count * c_out * m
  num_bytes = code_bytes(num_subvectors, layer.num_codes)
  num_bytes += storage.codebook_itemsize * count * layer.num_codes * length
  return LayerSize(
    path, shape, length, layer.num_codes, num_subvectors, num_bytes
  )


def compressed_shapes(plan: CompressionPlan, variables: PyTree) -> PyTree:
  """Returns the `jax.ShapeDtypeStruct`s that quantizing by a plan gives."""
  flat = trees.flatten(variables)

  def node(path: str) -> vq_array.VQArray:
    shape, layer = tuple(flat[path].shape), plan[path]
    spec, stack = layer.spec, layer.spec.stack_shape(shape)
    c_out, m, length = spec.layout(spec.layer_shape(shape))
    return vq_array.stack_layers(
      jnp.zeros((*stack, layer.num_codes, length), flat[path].dtype),
      jnp.zeros((*stack, c_out, m), vq_array.code_dtype(layer.num_codes)),
      spec.layer_shape(shape),
      spec,
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
