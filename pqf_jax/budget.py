"""Rules chosen under a byte budget: block and codewords of every layer."""

import math
import numbers
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.allocation import (
  distortion,
  first_layers,
  knapsack,
  sensitivity,
)
from pqf_jax.allocation import options as kernel_options
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages
from pqf_jax.discovery import kernels as kernel_discovery
from pqf_jax.discovery import masks, readers, samples

PyTree = Any

# Of all weights: a first layer with no more than this share stays dense.
_SMALL_SHARE = 1e-3


class LayerChoice(NamedTuple):
  """What one kernel gets of the budget.

  Attributes:
    path: of the kernel.
    shape: dense shape.
    rule: for this kernel alone; without `num_codes` it stays dense.
    payload_bytes: bytes in the packed file.
    distortion: predicted squared error over the kernel's variance.
    weight: what the outputs would change if the kernel were half noise.
  """

  path: str
  shape: tuple[int, ...]
  rule: plans.Rule
  payload_bytes: int
  distortion: float
  weight: float

  @property
  def loss(self) -> float:
    """Returns what the outputs change: weight * noise / signal."""
    noise = distortion.noise_to_signal(np.array(self.distortion))
    return self.weight * float(noise)


class Allocation(NamedTuple):
  """A budget divided among the kernels; `print` shows it as a table.

  Attributes:
    layers: what each kernel gets.
    size: bytes that `save` will write, without the header.
  """

  layers: tuple[LayerChoice, ...]
  size: plans.SizeReport

  @property
  def rules(self) -> list[plans.Rule]:
    """Returns one rule for each kernel, for `make_plan` or `compress`."""
    return [layer.rule for layer in self.layers]

  @property
  def loss(self) -> float:
    """Returns the sum of what all layers lose."""
    return sum(layer.loss for layer in self.layers)

  def __str__(self) -> str:
    """Returns a table of the layers."""
    width = max(len(layer.path) for layer in self.layers)

    def line(name: str, *cells: str) -> str:
      widths = 8, 6, 12, 10, 8
      padded = map(str.rjust, cells, widths)
      return " ".join([name.ljust(width), *padded]).rstrip()

    lines = [line("kernel", "channels", "codes", "bytes", "distortion", "loss")]
    for layer in self.layers:
      lines.append(
        line(
          layer.path,
          f"{layer.rule.channels if layer.rule.num_codes else ''}",
          f"{layer.rule.num_codes or 'dense'}",
          f"{layer.payload_bytes:,}",
          f"{layer.distortion:.3f}",
          f"{layer.loss:.3f}",
        )
      )
    total = self.size.payload_bytes
    rest = total - sum(layer.payload_bytes for layer in self.layers)
    lines.append(line("all else", "", "", f"{rest:,}", "", ""))
    lines.append(line("together", "", "", f"{total:,}", "", f"{self.loss:.3f}"))
    return "\n".join([*lines, f"{self.size.ratio:.1f} times smaller"])


def auto_rules(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  *sample: PyTree,
  target_ratio: float | None = None,
  target_bytes: int | None = None,
  batches: Sequence[tuple[PyTree, ...]] = (),
  mask_fn: masks.MaskFn | None = None,
  storage: storages.Storage = storages.PAPER,
  kmeans_steps: int = 1000,
) -> list[plans.Rule]:
  """Chooses block and codewords of every kernel for a number of bytes.

  Returns:
    The rules of `allocate_bytes`, which has the same arguments.
  """
  return allocate_bytes(
    apply_fn,
    variables,
    *sample,
    target_ratio=target_ratio,
    target_bytes=target_bytes,
    batches=batches,
    mask_fn=mask_fn,
    storage=storage,
    kmeans_steps=kmeans_steps,
  ).rules


def allocate_bytes(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  *sample: PyTree,
  target_ratio: float | None = None,
  target_bytes: int | None = None,
  batches: Sequence[tuple[PyTree, ...]] = (),
  mask_fn: masks.MaskFn | None = None,
  storage: storages.Storage = storages.PAPER,
  kmeans_steps: int = 1000,
) -> Allocation:
  """Divides a byte budget among the kernels so that the outputs lose least.

  Each kernel may stay dense or take 16 to 4,096 codewords of 1, 2, 4, ...
  channels. What k-means would lose by each is predicted from the weights in
  seconds; the sum of what all lose, each times its weight, is made as small as
  the budget allows. A first layer of few weights stays dense, as all does that
  is no kernel or that its layer cannot read as a `VQArray`.

  Args:
    apply_fn: `apply_fn(variables, *sample)`, a network in inference mode.
    variables: dense variable tree.
    *sample: a small example of its inputs; shapes suffice.
    target_ratio: how many times smaller the packed file is to be,
      `SizeReport.ratio`; or
    target_bytes: its bytes, without the header. No more are used; less than
      97 % of them only where the network has no choices so small.
    batches: inputs without labels, best all of one shape, on which the weight
      of each kernel is measured by one pass a kernel and batch; 64 samples
      suffice. Without any, a relative error counts alike in all layers.
    mask_fn: `mask_fn(*inputs)` -> bool, False for padding. Of outputs with
      these first axes, and more behind them, only those count that are True.
    storage: types of the parts of the packed file.
    kmeans_steps: k-means steps of all rules.

  Raises:
    InputError: not exactly one target, a target that cannot be met or that the
      dense network meets, variables that are not arrays with finite values, or
      batches that are no inputs.
  """
  vq_array.check_dense(variables)
  trees.check_arrays("variables", variables)
  plans.check_rule(plans.Rule(".*", None, kmeans_steps=kmeans_steps))
  samples.check_batches("batches", apply_fn, variables, batches)
  kernels = kernel_discovery.find_kernels(apply_fn, variables, *sample)
  options = _list_options(apply_fn, variables, sample, kernels, kmeans_steps)
  sizes = kernel_options.option_bytes(options, variables, storage)
  left = _bytes_for_kernels(
    options, sizes, variables, storage, target_ratio, target_bytes
  )

  flat = trees.flatten(variables)
  for path in options:
    trees.check_finite(path, flat[path])
  weights = (
    sensitivity.output_changes(
      apply_fn, variables, list(options), batches, mask_fn
    )
    if batches
    else {path: _num_layers(flat[path], kernels[path]) for path in options}
  )
  distortions = {
    path: kernel_options.option_distortions(flat[path], every)
    for path, every in options.items()
  }
  picked = knapsack.pick_least_loss(
    list(sizes.values()),
    [
      weights[path] * distortion.noise_to_signal(distortions[path])
      for path in options
    ],
    left,
  )
  choices = dict(zip(options, picked, strict=True))
  layers = tuple(
    LayerChoice(
      path,
      tuple(flat[path].shape),
      _make_rule(path, options[path][choice], kernels[path]),
      int(sizes[path][choice]),
      float(distortions[path][choice]),
      float(weights[path]),
    )
    for path, choice in choices.items()
  )
  return Allocation(layers, _predict(options, choices, variables, storage))


def check_target(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  *sample: PyTree,
  target_ratio: float | None = None,
  target_bytes: int | None = None,
  storage: storages.Storage = storages.PAPER,
) -> None:
  """Refuses a target that `allocate_bytes` cannot meet; shapes suffice.

  Raises:
    InputError: names the bytes that it can meet.
  """
  kernels = kernel_discovery.find_kernels(apply_fn, variables, *sample)
  options = _list_options(apply_fn, variables, sample, kernels, kmeans_steps=1)
  sizes = kernel_options.option_bytes(options, variables, storage)
  _bytes_for_kernels(
    options, sizes, variables, storage, target_ratio, target_bytes
  )


def _list_options(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  sample: tuple[PyTree, ...],
  kernels: Mapping[str, blocks.KernelAxes],
  kmeans_steps: int,
) -> dict[str, kernel_options.Options]:
  """Returns the options of each kernel; some can only stay dense."""
  if not kernels:
    raise errors.InputError(
      "there is nothing to compress: no product, convolution or lookup of "
      "apply_fn reads a variable as a kernel; give apply_fn(variables, "
      "*inputs), which uses the variables that it is given"
    )
  flat = trees.flatten(variables)
  first = first_layers.find_first_kernels(apply_fn, variables, sample, kernels)
  most = _SMALL_SHARE * sum(math.prod(leaf.shape) for leaf in flat.values())
  options: dict[str, kernel_options.Options] = {}
  for path, axes in kernels.items():
    if path in first and math.prod(flat[path].shape) <= most:
      options[path] = [None]
    else:
      options[path] = kernel_options.list_options(
        flat[path], axes, kmeans_steps
      )
  unreadable = []
  while plan := kernel_options.plan_of({p: o[0] for p, o in options.items()}):
    unread = readers.find_unreadable(apply_fn, plan, variables, *sample)
    if unread is None:
      break
    options[unread.path] = [None]
    unreadable.append(unread.path)
  if unreadable:
    warnings.warn(
      f"{len(unreadable)} kernels stay dense, such as {unreadable[0]}, since "
      "their layers take arrays only; a function that applies the network to "
      "pqf_jax.decode_params(variables) lets them be compressed",
      stacklevel=4,
    )
  if plan:
    return options
  raise errors.InputError(
    f"of {len(options)} kernels none can be compressed: 16 codewords need "
    "64 sub-vectors, and a layer that reads a VQArray, as those of Flax and "
    "jax.numpy do; give rules with fewer codewords by hand"
  )


def _predict(
  options: Mapping[str, kernel_options.Options],
  choices: Mapping[str, int],
  variables: PyTree,
  storage: storages.Storage,
) -> plans.SizeReport:
  chosen = {path: options[path][choice] for path, choice in choices.items()}
  return plans.predict_size(kernel_options.plan_of(chosen), variables, storage)


def _to_bytes(
  dense_bytes: int, target_ratio: float | None, target_bytes: int | None
) -> int:
  """Returns the bytes that the target allows."""
  targets = [t for t in (target_ratio, target_bytes) if t is not None]
  if len(targets) != 1 or not (
    isinstance(targets[0], numbers.Real) and 0 < targets[0] < math.inf
  ):
    raise errors.InputError(
      f"target_ratio is {target_ratio!r} and target_bytes {target_bytes!r}; "
      "give one of them, a number above 0"
    )
  if target_ratio is None:
    return math.floor(targets[0])
  return math.floor(dense_bytes / targets[0])


def _bytes_for_kernels(
  options: Mapping[str, kernel_options.Options],
  sizes: Mapping[str, np.ndarray],
  variables: PyTree,
  storage: storages.Storage,
  target_ratio: float | None,
  target_bytes: int | None,
) -> int:
  """Returns the bytes that are left where all that is no kernel has its own.

  Raises:
    InputError: no choice of options makes a file of the target.
  """
  any_size = _predict(options, dict.fromkeys(options, 0), variables, storage)
  dense_bytes = any_size.dense_bytes
  rest = any_size.payload_bytes - sum(int(size[0]) for size in sizes.values())
  budget = _to_bytes(dense_bytes, target_ratio, target_bytes)
  least = rest + sum(int(size.min()) for size in sizes.values())
  dense = rest + sum(int(size[-1]) for size in sizes.values())
  if not least <= budget < dense:
    raise errors.InputError(
      f"the target is {budget:,} bytes; this network takes {least:,} to "
      f"{dense - 1:,} when compressed (ratios of {dense_bytes / dense:.2f} to "
      f"{dense_bytes / least:.1f}), of which {rest:,} are no kernels"
    )
  return budget - rest


def _num_layers(kernel: Any, axes: blocks.KernelAxes) -> int:
  return math.prod(kernel.shape[axis] for axis in axes.stacked)


def _make_rule(
  path: str, layer: plans.LayerPlan | None, axes: blocks.KernelAxes
) -> plans.Rule:
  pattern = re.escape(path)
  if layer is None:
    return plans.Rule(pattern, None)
  # A plan that is made without the network takes kernels for [..., in, out].
  usual = layer.spec == blocks.BlockSpec(layer.spec.channels)
  return plans.Rule(
    pattern,
    layer.num_codes,
    layer.spec.channels,
    layer.kmeans_steps,
    None if usual else axes,
  )
