"""`VQArray`: a vector-quantized kernel that Flax modules read as an array."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from flax.core import meta
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pqf_jax import errors
from pqf_jax.core import blocks, modules, trees
from pqf_jax.numerics import gathers, segments

PyTree = Any


class VQArray(struct.PyTreeNode, meta.AxisMetadata):
  """A kernel stored as codebook + codes (section 3.2 of arXiv 2010.15703).

  Linen unboxes it because it is `AxisMetadata`, NNX reads it by `[...]`, and
  `jnp` functions by `__jax_array__`; so no layer class needs to know of it.
  NumPy, operators and methods such as `T` and `astype` see the dense array.
  Functions of `jax.lax` take no object but arrays: give them `kernel[...]`.
  The gradient of the gather is the codebook gradient of the paper's section
  3.4: for each codeword, the sum of the gradients of its sub-vectors.

  Stacked layers have their axes in both leaves at the same place as in the
  dense array: an array [in, layers, out] has a codebook [K, layers, D]. So
  whatever slices or maps the dense array (`lax.scan`, `nn.scan`, `vmap`) does
  the same to the leaves, and a slice, without these axes, is one layer.

  Invariants (not checked here, because JAX rebuilds nodes with leaves that
  are not arrays): `codes < K`; `spec.layout(kernel_shape) == (C_out, M, D)`.

  Attributes:
    codebook: [K, D] float, the trainable leaf; and the axes of stacked layers.
    codes: [C_out, M] uint8 or uint16, and the same axes.
    kernel_shape: the dense shape of one layer (static).
    spec: the layout of its sub-vectors (static); the stack begins at the first
      of its `stack_axes`, or at 0.
  """

  codebook: trees.Array
  codes: trees.Array
  kernel_shape: tuple[int, ...] = struct.field(pytree_node=False)
  spec: blocks.BlockSpec = struct.field(pytree_node=False)

  @property
  def stack_axes(self) -> tuple[int, ...]:
    """Returns the axes of stacked layers, of the leaves and the dense array."""
    start, *_ = (*self.spec.stack_axes, 0)
    return tuple(range(start, start + self.codebook.ndim - 2))

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the dense shape, with the axes of stacked layers."""
    start, *_ = (*self.spec.stack_axes, 0)
    stack = tuple(self.codebook.shape[axis] for axis in self.stack_axes)
    return self.kernel_shape[:start] + stack + self.kernel_shape[start:]

  @property
  def ndim(self) -> int:
    """Returns the number of axes of the dense array."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Returns the number of weights of the dense array."""
    return int(np.prod(self.shape))

  @property
  def dtype(self) -> jnp.dtype:
    """Returns the type of the codebook, which the dense array shares."""
    return self.codebook.dtype

  def decode(self) -> jax.Array:
    """Returns the dense kernel, of `shape`.

    Raises:
      InputError: an axis is lost that is not one of stacked layers.
    """
    shapes = self.codebook.shape, self.codes.shape
    if min(map(len, shapes)) < 2 or len(shapes[0]) != len(shapes[1]):
      raise errors.InputError(
        f"a VQArray has a codebook of shape {shapes[0]} and codes of shape "
        f"{shapes[1]}, since something sliced or mapped an axis of it other "
        f"than the stack axes {self.spec.stack_axes}; name that axis by "
        "Rule(..., axes=pqf_jax.KernelAxes(inputs, outputs, stacked))"
      )

    def decode_one(codebook: trees.Array, codes: trees.Array) -> jax.Array:
      return _decode(codebook, codes, self.kernel_shape, self.spec)

    for axis in self.stack_axes:
      decode_one = jax.vmap(decode_one, axis, axis)
    return decode_one(self.codebook, self.codes)

  __jax_array__ = decode
  unbox = decode  # Linen reads the variable

  def __getitem__(self, index: Any) -> jax.Array:
    if self.stack_axes[:1] == (0,) and _is_place(index):  # one of the layers
      return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self).decode()
    return self.decode()[index]

  def replace_boxed(self, val: Any) -> Any:
    """Returns the dense value that Linen writes, which replaces the node."""
    return val

  def add_axis(self, index: int, params: dict[Any, Any]) -> "VQArray":
    """Returns the node; `nn.scan` and `nn.vmap` stack the leaves themselves."""
    del index, params
    return self

  remove_axis = add_axis

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    del copy  # decoding makes a new array
    return np.asarray(self.decode(), dtype)

  # NumPy's operators leave the work to those of this class.
  __array_priority__ = 100

  def __len__(self) -> int:
    return len(self[...])

  def __iter__(self) -> Iterator[jax.Array]:
    return iter(self[...])

  def __bool__(self) -> bool:
    return bool(self[...])

  def __getattr__(self, name: str) -> Any:
    # Only what JAX's arrays have, such as `T`, `astype` and `mean`.
    if name.startswith("_") or not hasattr(jax.Array, name):
      raise AttributeError(
        f"'VQArray' object has no attribute {name!r}; kernel[...] is the array"
      )
    return getattr(self[...], name)


def _is_place(index: Any) -> bool:
  """Returns whether an index is a whole number, maybe one that is traced."""
  return (
    isinstance(index, int | np.integer | np.ndarray | jax.Array)
    and not isinstance(index, bool)
    and np.ndim(index) == 0
    and jnp.issubdtype(jnp.result_type(index), jnp.integer)
  )


def _on_dense(name: str) -> Callable[..., Any]:
  """Returns the operator of the dense array, such as `__add__`."""

  def operate(self: VQArray, *others: Any) -> Any:
    dense = (x[...] if is_vq(x) else x for x in others)
    return getattr(self[...], name)(*dense)

  return operate


for _name in (
  *("neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge", "contains"),
  *(
    side + operator
    for operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    for side in ("", "r")
  ),
  *("matmul", "rmatmul", "divmod", "rdivmod"),
):
  setattr(VQArray, f"__{_name}__", _on_dense(f"__{_name}__"))


nnx.register_data_type(VQArray)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _decode(
  codebook: jax.Array,
  codes: jax.Array,
  shape: tuple[int, ...],
  spec: blocks.BlockSpec,
) -> jax.Array:
  """Returns the kernel of a codebook [K, D] and codes [C_out, M]."""
  # The gradient is summed exactly, the same bits at every run; XLA's own is a
  # floating-point scatter-add. TPUs pad rows of D numbers to 128, so that they
  # have programs of their own.

  def by_rows(codebook: jax.Array, codes: jax.Array) -> jax.Array:
    # 'clip' costs nothing and spares XLA the out-of-bounds branch of 'fill'.
    vectors = jnp.take(codebook, codes, axis=0, mode="clip")
    return spec.from_blocks(vectors, shape)

  def by_columns(codebook: jax.Array, codes: jax.Array) -> jax.Array:
    # In the order of the kernel, whose output channels are the lanes.
    return spec.from_blocks(gathers.columns(codebook, codes.T).T, shape)

  return lax.platform_dependent(
    codebook, codes, tpu=by_columns, default=by_rows
  )


def _decode_forward(
  codebook: jax.Array,
  codes: jax.Array,
  shape: tuple[int, ...],
  spec: blocks.BlockSpec,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _decode(codebook, codes, shape, spec), (codebook, codes)


def _decode_backward(
  shape: tuple[int, ...],
  spec: blocks.BlockSpec,
  residuals: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, None]:
  del shape
  codebook, codes = residuals
  num_codes, length = codebook.shape

  def by_rows(gradient: jax.Array, codes: jax.Array) -> jax.Array:
    vectors = spec.to_blocks(gradient).reshape(-1, length)
    return segments.segment_sum(vectors, codes.reshape(-1), num_codes)

  def by_columns(gradient: jax.Array, codes: jax.Array) -> jax.Array:
    vectors = spec.to_blocks(gradient).T.reshape(length, -1)
    return segments.column_sum(vectors, codes.T.reshape(-1), num_codes)

  sums = lax.platform_dependent(
    gradient, codes, tpu=by_columns, default=by_rows
  )
  return sums, None


_decode.defvjp(_decode_forward, _decode_backward)


def stack_layers(
  codebooks: trees.Array,
  codes: trees.Array,
  kernel_shape: tuple[int, ...],
  spec: blocks.BlockSpec,
) -> VQArray:
  """Returns a kernel whose layers are stacked along `spec.stack_axes`.

  Args:
    codebooks: [..., K, D], the axes of the stack first.
    codes: [..., C_out, M], likewise.
    kernel_shape: the dense shape of one layer.
    spec: the layout of its sub-vectors.
  """
  axes = spec.stack_axes
  if axes and axes[0]:
    codebooks, codes = (
      jnp.moveaxis(leaf, range(len(axes)), axes) for leaf in (codebooks, codes)
    )
  return VQArray(codebooks, codes, kernel_shape, spec)


def shard_like(node: VQArray, kernel: trees.Array) -> VQArray:
  """Returns the node on the devices over which its dense kernel is sharded.

  The codes are cut along C_out, by the axes of the mesh that cut the kernel
  anywhere, if they divide C_out; the codebook is on every device.
  """
  place = getattr(kernel, "sharding", None)
  if not isinstance(place, NamedSharding) or place.mesh.size == 1:
    return node
  cuts: list[str] = []
  for entry in place.spec:
    cuts.extend(entry if isinstance(entry, tuple) else [entry] if entry else [])
  channels = min({0, 1, 2} - set(node.stack_axes))
  num_parts = math.prod(place.mesh.shape[name] for name in cuts)
  if node.codes.shape[channels] % num_parts:
    cuts = []
  along = PartitionSpec(*[None] * channels, tuple(cuts) or None)
  return node.replace(
    codebook=jax.device_put(node.codebook, place.update(spec=PartitionSpec())),
    codes=jax.device_put(node.codes, place.update(spec=along)),
  )


def is_vq(leaf: Any) -> TypeGuard[VQArray]:
  """Returns whether a node of a variable tree is a `VQArray`."""
  return isinstance(leaf, VQArray)


def check_dense(variables: PyTree) -> None:
  """Refuses variables that are compressed already, or only shapes.

  Raises:
    InputError: names the leaves.
  """
  flat = trees.flatten(variables, is_vq)
  compressed = [path for path, leaf in flat.items() if is_vq(leaf)]
  if compressed:
    raise errors.InputError(
      f"{len(compressed)} kernels are compressed already, such as "
      f"{compressed[0]}; give dense variables, such as "
      "pqf_jax.decode_params(variables) returns"
    )
  trees.check_arrays("variables", variables)


def code_dtype(num_codes: int) -> jnp.dtype:
  """Returns the smallest unsigned type that holds `num_codes - 1`."""
  return jnp.dtype(np.min_scalar_type(num_codes - 1))


def decode_params(variables: PyTree) -> PyTree:
  """Replaces every `VQArray` of a tree by its dense kernel."""
  return trees.map_leaves(
    lambda leaf: leaf.decode() if is_vq(leaf) else leaf, variables, is_vq
  )


def parameters_of(variables: PyTree) -> Callable[[str, jax.Array], bool]:
  """Returns which leaves are trained by default, as (path, leaf) -> bool.

  Floats: of Linen's variables those under `params/`, of an NNX module those in
  an `nnx.Param`, and of any other tree all.
  """
  parameters = modules.parameters(variables)
  if parameters is None:
    is_linen = isinstance(variables, Mapping) and "params" in variables
    start = "params/" if is_linen else ""

    def is_parameter(path: str) -> bool:
      return path.startswith(start)
  else:

    def is_parameter(path: str) -> bool:  # of an array, or of a `VQArray`
      return not parameters.isdisjoint((path, path.rpartition("/")[0]))

  return lambda path, leaf: (
    is_parameter(path) and jnp.issubdtype(leaf.dtype, jnp.floating)
  )


def split_trainable(
  variables: PyTree,
  is_trainable: Callable[[str, jax.Array], bool] | None = None,
) -> tuple[PyTree, PyTree]:
  """Separates trainable leaves from the rest (integer codes, statistics).

  Integer codes break `jax.grad`, so gradients are taken of the first part.

  Args:
    variables: a variable tree; a `VQArray` is two leaves of it.
    is_trainable: (path, leaf) -> bool; None: see `parameters_of`.

  Returns:
    (trainable, frozen): two trees of the same structure, each with None where
    the other has the leaf. Of modules they are no modules, but trees that `jit`
    and optimizers take; `merge_trainable` undoes it all.
  """
  choose = is_trainable or parameters_of(variables)
  sealed = modules.seal(variables)
  chosen = jax.tree_util.tree_map_with_path(
    lambda key_path, leaf: choose(trees.path_name(key_path), leaf), sealed
  )
  return (
    jax.tree.map(lambda leaf, yes: leaf if yes else None, sealed, chosen),
    jax.tree.map(lambda leaf, yes: None if yes else leaf, sealed, chosen),
  )


def merge_trainable(trainable: PyTree, frozen: PyTree) -> PyTree:
  """Joins the two trees that `split_trainable` returned."""
  return modules.unseal(fill(trainable, frozen))


def fill(tree: PyTree, other: PyTree) -> PyTree:
  """Returns a tree with the leaves of another where it has None."""
  return jax.tree.map(
    lambda left, right: right if left is None else left,
    tree,
    other,
    is_leaf=lambda leaf: leaf is None,
  )
