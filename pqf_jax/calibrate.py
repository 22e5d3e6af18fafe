"""Stage between quantize and fine-tune: repairs a network without training."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.calibration import (
  layers,
  moments,
  programs,
  reconstruction,
  streams,
)
from pqf_jax.core import trees, vq_array
from pqf_jax.discovery import masks as sample_masks
from pqf_jax.discovery import samples, tracing

PyTree = Any

# Input rows of a layer that its moments are taken of: so many for each of the n
# entries of a row, and never fewer than this. Of the rows of large maps a part
# is as good, since neighbours are alike.
_ROWS_PER_ENTRY = 16
_LEAST_ROWS = 1 << 14


class LayerError(NamedTuple):
  """Squared error of one layer's outputs over their square.

  Attributes:
    path: of the kernel; of layer 2 of a stack `path[2]`.
    before: with the codes and the codebook of k-means.
    after: with those that were chosen.
  """

  path: str
  before: float
  after: float


def calibrate_params(
  apply_fn: Callable[..., PyTree],
  dense: PyTree,
  quantized: PyTree,
  batches: Sequence[tuple[PyTree, ...]],
  *,
  reconstruct: bool = True,
  rounds: int = 2,
  damping: float = 1e-3,
  mask_fn: sample_masks.MaskFn | None = None,
  on_layer: Callable[[LayerError], None] = lambda layer: None,
) -> tuple[PyTree, dict[str, LayerError]]:
  """Makes a quantized network follow the dense one, layer by layer.

  No labels, no gradients, no training: both networks run side by side on some
  samples. Each compressed kernel that a convolution or matrix product reads
  gets the codes and the codebook whose outputs, from inputs as the layers
  before really give them, come nearest to the dense network's; see
  `calibration.reconstruction`. Then each batch norm's statistics and each bias
  give its outputs the mean and the variance that they have in the dense
  network. `lax.scan` along a stack of layers counts as so many layers. What
  several layers share, such as a head of several maps, suits the inputs of all.
  Kernels under `vmap`, of other loops, of lookups, or that read their own
  outputs keep their codes. An unchanged network is returned as it is.

  Args:
    apply_fn: `apply_fn(variables, *inputs)`, a network in inference mode.
    dense: its variables before quantization, in the same order of channels.
    quantized: the same with `VQArray`s.
    batches: inputs of `apply_fn`, all of the same shapes; about 1,000 samples,
      with the augmentation that the network was trained with. All activations
      of one layer are in memory at a time.
    reconstruct: False keeps codes and codebooks, and repairs only norms and
      biases.
    rounds: how often codes are improved, see `reconstruction.reconstruct`.
    damping: see there; above 0, at most 1.
    mask_fn: `mask_fn(*inputs)` -> bool [samples, positions], or of other first
      axes, False for padding: `lambda tokens: tokens != 0`. Where values have
      these first axes, and more behind them, only those count that are True;
      all others count alike. None: there is no padding.
    on_layer: called for each reconstructed layer, for progress.

  Returns:
    (variables like `quantized`, {path: LayerError} of what was reconstructed).

  Raises:
    InputError: there are no batches, their shapes differ, the two trees do not
      fit, `apply_fn` cannot be traced, values are not finite, `rounds` or
      `damping` is out of range, or a mask is none of a layer's positions.
  """
  _check_numbers(rounds, damping)
  run = _Calibration(apply_fn, dense, quantized, batches, mask_fn)
  found = {}
  for together in streams.run_order(run.streams.operations, run.reads.groups):
    read = run.find_read(together)
    if read is not None:
      if vq_array.is_vq(run.leaves[read.path]):
        layer = (
          _rebuild(run, together, read, rounds=rounds, damping=damping)
          if reconstruct
          else None
        )
        if layer is not None:
          found[layer.path] = layer
          on_layer(layer)
      else:
        _match(run, together, read)
    for operation in together:
      run.streams.run(operation)
  before = trees.flatten(quantized, vq_array.is_vq)
  return trees.replace(dense, jax.tree.map(_place, run.leaves, before)), found


def _place(leaf: trees.Array, before: trees.Array) -> trees.Array:
  """Returns a leaf on the devices over which it was spread, if it was."""
  if isinstance(before, jax.Array) and len(before.devices()) > 1:
    return jax.device_put(leaf, before.sharding)
  return leaf


def check_samples(
  name: str,
  apply_fn: Callable[..., PyTree],
  dense: PyTree,
  batches: Sequence[tuple[PyTree, ...]],
) -> None:
  """Refuses samples that a network cannot be calibrated with.

  Raises:
    InputError: there are none, or see `samples.check_batches`.
  """
  samples.check_batches(name, apply_fn, dense, batches, alike=True)
  if not batches:
    raise errors.InputError(f"{name} is empty; give some samples")


class _Calibration:
  """The two networks, and the leaves of the quantized one so far."""

  def __init__(
    self,
    apply_fn: Callable[..., PyTree],
    dense: PyTree,
    quantized: PyTree,
    batches: Sequence[tuple[PyTree, ...]],
    mask_fn: sample_masks.MaskFn | None,
  ):
    self.dense = trees.flatten(dense)
    self.leaves = trees.flatten(quantized, vq_array.is_vq)
    _check_alike(self.dense, self.leaves)
    check_samples("batches", apply_fn, dense, batches)
    program = streams.write_out(
      tracing.trace_program(apply_fn, dense, tuple(batches[0])),
      len(self.dense),
    )
    self._numbers = dict(zip(self.dense, program.arguments, strict=False))
    self.reads = layers.find_reads(
      program, {number: path for path, number in self._numbers.items()}
    )
    self.norms = _statistics(self.dense)
    self.masks = [sample_masks.make_mask(mask_fn, batch) for batch in batches]
    _check_masks(self.masks, program, self.reads)
    pairs = [
      streams.Pair(leaf, _to_array(self.leaves[path]))
      for path, leaf in self.dense.items()
    ]
    self.streams = streams.Streams(
      program, pairs, [trees.leaves(batch) for batch in batches]
    )

  def find_read(
    self, together: Sequence[streams.Operation]
  ) -> layers.Read | None:
    """Returns what these operations read, if nothing else reads it."""
    results = tuple(operation.results[0] for operation in together)
    is_all = results in self.reads.groups
    return self.reads.by_result[results[0]] if is_all else None

  def inputs(
    self, together: Sequence[streams.Operation], read: layers.Read
  ) -> tuple[list[streams.Pair], list[jax.Array]]:
    """Returns what meets the variable, for each operation on each batch.

    With it, for each of these values, the mask of its batch.
    """
    atoms = [operation.operands[1 - read.operand] for operation in together]
    pairs = [pair for atom in atoms for pair in self.streams.values(atom)]
    return pairs, self.masks * len(together)

  def replace(self, path: str, leaf: Any) -> None:
    """Gives the quantized network another leaf."""
    array = _to_array(leaf)
    _check_finite(path, array)
    self.leaves[path] = leaf
    self.streams.replace(self._numbers[path], array)

  def replace_layer(self, path: str, index: tuple[Any, ...], leaf: Any) -> None:
    """Gives the quantized network another layer of a leaf."""
    self.replace(path, jnp.asarray(self.leaves[path]).at[index].set(leaf))


@jax.jit
def _are_finite(values: PyTree) -> jax.Array:
  return jnp.array(
    [jnp.isfinite(array).all() for array in jax.tree.leaves(values)]
  ).all()


def _check_finite(path: str, values: PyTree) -> None:
  """Refuses what the samples gave, where a layer can do nothing with it."""
  if not _are_finite(values):
    raise errors.InputError(
      f"the calibration samples give NaN, infinite or too large values before "
      f"{path}; check the samples and the dense network"
    )


def _statistics(flat: trees.FlatTree) -> dict[str, str]:
  """Returns {path of a norm's means: path of its variances}, by their names."""
  pairs = {
    path: f"{path.removesuffix('mean')}var"
    for path in flat
    if path.rpartition("/")[2] == "mean"
  }
  return {
    mean: var
    for mean, var in pairs.items()
    if var in flat and np.shape(flat[var]) == np.shape(flat[mean])
  }


def _to_array(leaf: Any) -> Any:
  return leaf.decode() if vq_array.is_vq(leaf) else leaf


def _match(
  run: _Calibration, together: Sequence[streams.Operation], read: layers.Read
) -> None:
  """Corrects the statistics or the bias that operations read."""
  eqn = together[0].eqn
  name = eqn.primitive.name
  leaf, index = jnp.asarray(run.dense[read.path]), read.picked
  is_mean = name == "sub" and read.operand == 1 and read.path in run.norms
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  if not is_float or not (is_mean or name == "add"):
    return
  inputs, masks = run.inputs(together, read)
  shape = tracing.shape_of(eqn.invars[read.operand])
  axes = tuple(axis for axis in read.axes if shape[axis] > 1)
  channels = [inputs[0].dense.shape[axis] for axis in read.axes]
  if leaf[index].size == 1 < max(channels, default=1):
    return  # one number for all channels
  if is_mean:
    var_path = run.norms[read.path]
    var = jnp.asarray(run.dense[var_path])[index]
    mean, var = moments.match_norm(inputs, masks, axes, leaf[index], var)
    run.replace_layer(read.path, index, mean)
    run.replace_layer(var_path, index, var)
  else:
    bias = moments.match_bias(inputs, masks, axes, leaf[index])
    run.replace_layer(read.path, index, bias)


def _rebuild(
  run: _Calibration,
  together: Sequence[streams.Operation],
  read: layers.Read,
  *,
  rounds: int,
  damping: float,
) -> LayerError | None:
  """Chooses codes and codebook of a kernel; None where the layer is unknown."""
  node, kernel = run.leaves[read.path], jnp.asarray(run.dense[read.path])
  axes = [axis for axis in range(kernel.ndim) if axis not in node.stack_axes]
  if read.dims != tuple(axes):
    return None
  # Of a convolution whose padding depends on the inputs' size, say.
  kinds = {
    layers.find_layer(operation.eqn, read.operand, node.spec)
    for operation in together
  }
  layer = kinds.pop()
  if layer is None or kinds or len(together[0].operands) != 2:
    return None
  trees.check_finite(read.path, kernel[read.picked])
  codebook, codes = (
    jnp.asarray(leaf)[read.picked] for leaf in (node.codebook, node.codes)
  )
  codebook = codebook.astype(jnp.float32)
  vectors = node.spec.to_blocks(kernel[read.picked].astype(jnp.float32))
  seen = _find_seen(layer, together, read, vectors.shape[2])
  rows = vectors[..., seen].reshape(
    layer.groups, vectors.shape[0] // layer.groups, -1
  )
  inputs, masks = run.inputs(together, read)
  gathered = _add_moments(layer, inputs, masks, rows, tuple(seen))
  _check_finite(read.path, gathered)
  result = reconstruction.reconstruct(
    gathered,
    rows,
    codebook[:, seen],
    codes.astype(jnp.int32).reshape(layer.groups, -1, vectors.shape[1]),
    rounds=rounds,
    damping=damping,
  )
  before, after = float(result.error_before), float(result.error)
  # No better, or not a number: the layer keeps what k-means chose.
  if after < before:
    chosen_codes = result.codes.reshape(codes.shape)
    if len(seen) < vectors.shape[2]:
      # Inputs of another size may see the rest.
      codebook = reconstruction.mean_vectors(vectors, chosen_codes, codebook)
    chosen = (codebook.at[:, seen].set(result.codebook), chosen_codes)
    codebook, codes = (
      jnp.asarray(leaf).at[read.picked].set(new.astype(leaf.dtype))
      for leaf, new in zip((node.codebook, node.codes), chosen, strict=True)
    )
    run.replace(read.path, node.replace(codebook=codebook, codes=codes))
  return LayerError(read.layer, before, min(before, after))


def _find_seen(
  layer: layers.Layer,
  together: Sequence[streams.Operation],
  read: layers.Read,
  length: int,
) -> list[int]:
  """Returns the entries of sub-vectors that see inputs, not padding alone.

  On a map of one place 8 of 9 taps of a kernel see nothing; if none sees
  anything, all are returned.
  """
  taps = np.any(
    [
      layer.find_seeing(
        tracing.shape_of(operation.eqn.invars[1 - read.operand])
      )
      for operation in together
    ],
    axis=0,
  )
  entries = np.resize(taps, length)  # a row for each channel
  return np.flatnonzero(entries if entries.any() else ~entries).tolist()


def _add_moments(
  layer: layers.Layer,
  pairs: Sequence[streams.Pair],
  masks: Sequence[jax.Array],
  kernel: jax.Array,
  seen: tuple[int, ...],
) -> reconstruction.InputMoments:
  """Adds up the moments of a layer's inputs over the batches."""
  wanted = max(_ROWS_PER_ENTRY * kernel.shape[2], _LEAST_ROWS) // len(pairs)
  key = jax.random.key(0)
  parts = (
    _batch_moments(
      layer, wanted, seen, jax.random.fold_in(key, i), pair, mask, kernel
    )
    for i, (pair, mask) in enumerate(zip(pairs, masks, strict=True))
  )
  return functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)


@functools.partial(programs.jit, static_argnames=("layer", "wanted", "seen"))
def _batch_moments(
  layer: layers.Layer,
  wanted: int,
  seen: tuple[int, ...],
  key: jax.Array,
  pair: streams.Pair,
  mask: jax.Array,
  kernel: jax.Array,
) -> reconstruction.InputMoments:
  """Returns the moments of at most so many of a batch's input rows."""
  rows, others = map(layer.input_rows, (pair.quantized, pair.dense))
  counts = None
  if mask.ndim and sample_masks.has_mask(pair.dense.shape, mask.shape):
    spread = sample_masks.spread_mask(mask, pair.dense.shape)
    # A window counts where it sees something that does.
    counts = layer.input_rows(spread.astype(rows.dtype)).max((1, 2))
  if wanted < len(rows):
    # Those that count come first.
    chosen = jax.random.choice(
      key, len(rows), (wanted,), replace=False, p=counts
    )
    rows, others = rows[chosen], others[chosen]
    counts = None if counts is None else counts[chosen]
  if counts is not None:
    # Not as a product: padding may be NaN.
    is_counted = counts[:, None, None] > 0
    rows, others = (jnp.where(is_counted, x, 0) for x in (rows, others))
  rows, others = (
    x.astype(jnp.float32)
    .reshape(*x.shape[:2], kernel.shape[2] // len(seen), -1)[..., list(seen)]
    .reshape(*x.shape[:2], -1)
    for x in (rows, others)
  )
  return reconstruction.input_moments(rows, others, kernel)


def _check_masks(
  masks: Sequence[jax.Array],
  program: streams.Program,
  reads: layers.Reads,
) -> None:
  """Refuses masks that belong to no layer's inputs."""
  shapes = {
    tracing.shape_of(operation.eqn.invars[1 - read.operand])
    for operation in program.operations
    if (read := reads.by_result.get(operation.results[0])) is not None
    and len(operation.operands) == 2
  }
  for mask in masks:
    if not any(sample_masks.has_mask(shape, mask.shape) for shape in shapes):
      raise errors.InputError(
        f"mask_fn gives a mask {list(mask.shape)}, but no layer has inputs "
        f"with these first axes; there are {sorted(shapes)}"
      )


def _check_numbers(rounds: int, damping: float) -> None:
  if rounds < 0 or not 0 < damping <= 1:
    raise errors.InputError(
      f"rounds is {rounds!r} and damping {damping!r}; give 0 rounds or more, "
      "and a damping above 0, at most 1"
    )


def _check_alike(dense: trees.FlatTree, quantized: trees.FlatTree) -> None:
  for path in dense.keys() | quantized.keys():
    shapes = [
      np.shape(flat[path]) if path in flat else None
      for flat in (dense, quantized)
    ]
    if shapes[0] != shapes[1]:
      raise errors.InputError(
        f"{path} has shape {shapes[0]} in the dense variables and {shapes[1]} "
        "in the quantized ones; give those that were quantized, after the "
        "permutation"
      )
