"""Three ways to apply a compressed network whose code knows of none."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from pqf_jax import errors, nvidia
from pqf_jax.core import modules, trees, vq_array
from pqf_jax.discovery import tracing
from pqf_jax.inference import kernels, readers

PyTree = Any

FORMS = ("auto", "dense", "layer", "fused")
"""How a compressed kernel is applied; `make_apply` says what each does."""

LARGE = 2**22
"""The weights of a matrix from which `auto` keeps it as codes."""


class Applied(NamedTuple):
  """A network made ready.

  Attributes:
    apply_fn: (variables, *inputs) -> outputs; pure, and compiled for each new
      set of shapes. `jit`, `vmap` and `grad` compose with it.
    variables: what it takes: the network's, with kernels in their new form.
  """

  apply_fn: tracing.ApplyFn
  variables: PyTree


def make_apply(
  apply_fn: tracing.ApplyFn,
  variables: PyTree,
  form: str = "auto",
  *,
  crossover: int | None = None,
) -> Applied:
  """Makes a compressed network ready for inference.

      network = pqf_jax.inference.make_apply(model.apply, variables, "fused")
      logits = network.apply_fn(network.variables, images)

  The forms:

  - dense: all kernels are decoded now. As fast as the network ever was, and as
    large.
  - layer: each kernel is decoded where it is read, after the layer's inputs are
    computed: memory for the codes and the largest kernel. Of an embedding only
    the rows that are read are decoded.
  - fused: matrix products, and 1x1 convolutions of few positions, are made
    straight from the codes (`products`); the rest is as in layer.
  - auto: fused for matrices that no cache holds, whose reading takes the time;
    dense for the others, and for convolutions, which read a weight often. On a
    Hopper GPU such a matrix is kept in both forms: codes serve the products
    whose rows are few enough for its kernel. On other GPUs and TPUs: dense.

  On GPUs and TPUs fused saves memory; it is faster than dense only where that
  kernel serves, and 2 to 5 times slower for all else (docs/inference.md).

  Inside a loop (`lax.scan`, `nn.scan`) stacked kernels stay codes as well. A
  kernel that anything else than a convolution, product, row lookup, cast or
  transposition reads is decoded there.

  Args:
    apply_fn: (variables, *inputs) -> outputs, made of JAX operations.
    variables: a tree or module with `VQArray` kernels, such as `pqf_jax.load`
      returns.
    form: one of `FORMS`.
    crossover: up to so many rows of activations are multiplied by tables; None:
      as measured (`product`).

  Raises:
    InputError: there is no such form, the crossover is negative, or a kernel
      has no values. When it is applied: the function cannot be traced.
  """
  if form not in FORMS:
    raise errors.InputError(
      f"form is {form!r}; expected one of {', '.join(FORMS)}"
    )
  if crossover is not None and crossover < 0:
    raise errors.InputError(
      f"crossover is {crossover}; expected a number of rows, 0 for no tables"
    )
  leaves = trees.flatten(variables, vq_array.is_vq)
  compressed = {p: leaf for p, leaf in leaves.items() if vq_array.is_vq(leaf)}
  trees.check_arrays("variables", compressed)
  prepare = {
    "dense": vq_array.VQArray.decode,
    "layer": kernels.defer,
    "fused": kernels.arrange,
    "auto": _choose,
  }[form]
  prepared = trees.map_leaves(
    lambda leaf: prepare(leaf) if vq_array.is_vq(leaf) else leaf,
    modules.seal(variables),
    vq_array.is_vq,
  )
  if form == "dense":
    compiled = jax.jit(
      lambda sealed, *inputs: modules.call(apply_fn, sealed, inputs)
    )
    return Applied(compiled, prepared)
  return Applied(jax.jit(_rewrite(apply_fn, crossover)), prepared)


def _choose(kernel: vq_array.VQArray) -> kernels.Kernel | jax.Array:
  shape = kernel.kernel_shape
  is_large = len(shape) == 2 and math.prod(shape) >= LARGE
  if is_large and nvidia.is_available():
    return kernels.arrange(kernel).replace(dense=kernel.decode())
  if is_large and jax.default_backend() == "cpu":
    return kernels.arrange(kernel)
  return kernel.decode()


def _rewrite(
  apply_fn: tracing.ApplyFn, crossover: int | None
) -> tracing.ApplyFn:
  """Returns the function that reads kernels as codes."""

  def apply(variables: PyTree, *inputs: PyTree) -> PyTree:
    structures: list[Any] = []

    def flat(*arguments: PyTree, **named: PyTree) -> list[Any]:
      leaves, structure = jax.tree.flatten(apply_fn(*arguments, **named))
      structures.append(structure)
      return leaves

    dense = jax.tree.map(_abstract, variables, is_leaf=kernels.is_kernel)
    program = tracing.trace_program(flat, dense, inputs)
    values, _ = jax.tree.flatten((variables, inputs), is_leaf=kernels.is_kernel)
    results = _Evaluator(crossover).run(program, values)
    return jax.tree.unflatten(structures[-1], map(_decode, results))

  return apply


def _abstract(leaf: Any) -> Any:
  if not kernels.is_kernel(leaf):
    return leaf
  return jax.eval_shape(leaf.decode)


def _decode(value: Any, others: Sequence[Any] = ()) -> Any:
  return value.decode(others) if kernels.is_kernel(value) else value


class _Evaluator(NamedTuple):
  """Runs programs whose operands, and results, may be kernels."""

  crossover: int | None

  def run(self, program: tracing.Jaxpr, operands: Sequence[Any]) -> list[Any]:
    """Returns the results of a program."""
    body = tracing.program_body(program)
    values = dict(tracing.program_constants(program))
    values |= zip(body.invars, operands, strict=True)

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, jax_core.Literal) else values[atom]

    for eqn in body.eqns:
      results = self._equation(eqn, [read(atom) for atom in eqn.invars])
      values |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in body.outvars]

  def _equation(
    self, eqn: tracing.Equation, operands: list[Any]
  ) -> Sequence[Any]:
    read = list(filter(kernels.is_kernel, operands))
    called = tracing.called_program(eqn)
    # The gradients that a function defines for itself need its call.
    is_custom = eqn.primitive.name.startswith("custom_")
    if read and called is not None and not is_custom:
      return self.run(called, operands)
    if read and eqn.primitive.name == "scan":
      return self._scan(eqn, operands)
    if len(read) == 1:
      result = self._read(eqn, operands, read[0])
      if result is not None:
        return [result]
    others = list(filter(_is_number, operands)) if read else []
    dense = [_decode(value, others) for value in operands]
    return _bind(eqn, dense)

  def _read(
    self, eqn: tracing.Equation, operands: list[Any], kernel: kernels.Kernel
  ) -> Any:
    """Returns the result of an equation that reads codes, or None."""
    others = [atom for atom in eqn.invars if not _is_literal(atom)]
    if len(others) == 1 and len(eqn.outvars) == 1:
      return _change(eqn, operands, kernel)
    reader = readers.READERS.get(eqn.primitive.name)
    if reader is None or not kernel.is_layer:
      return None
    return reader(eqn, operands, self.crossover)

  def _scan(self, eqn: tracing.Equation, operands: list[Any]) -> list[Any]:
    """Runs a loop whose body slices stacked kernels, or reads fixed ones."""
    params = eqn.params
    num_fixed, num_carried = tracing.count_unstacked(eqn)
    fixed = operands[:num_fixed]
    carried = map(_decode, operands[num_fixed:][:num_carried])
    sliced = [
      x if kernels.is_kernel(x) and x.is_scanned else _decode(x)
      for x in operands[num_fixed + num_carried :]
    ]

    def step(
      carried: list[Any], sliced: list[Any]
    ) -> tuple[list[Any], list[Any]]:
      results = self.run(params["jaxpr"], [*fixed, *carried, *sliced])
      results = list(map(_decode, results))
      return results[:num_carried], results[num_carried:]

    final, stacked = lax.scan(
      step,
      list(carried),
      sliced,
      params["length"],
      params["reverse"],
      params["unroll"],
    )
    return [*final, *stacked]


def _change(
  eqn: tracing.Equation, operands: list[Any], kernel: kernels.Kernel
) -> kernels.Kernel:
  """Returns the kernel after an equation that reads nothing else."""
  name, params = eqn.primitive.name, eqn.params
  if name in ("copy", "copy_p"):
    return kernel
  if name == "convert_element_type" and not kernel.then:
    return kernel.astype(params["new_dtype"])
  if name == "transpose":
    moved = kernel.transpose(params["permutation"])
    if moved is not None:
      return moved

  def change(dense: jax.Array) -> jax.Array:
    values = [dense if kernels.is_kernel(x) else x for x in operands]
    (result,) = _bind(eqn, values)
    return result

  return kernel.replace(then=(*kernel.then, change))


def _is_number(value: Any) -> bool:
  kinds = jnp.floating, jnp.integer
  return (
    isinstance(value, jax.Array)
    and value.size > 0
    and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
  )


def _is_literal(atom: Any) -> bool:
  return isinstance(atom, jax_core.Literal)


def _bind(eqn: tracing.Equation, operands: list[Any]) -> Sequence[Any]:
  params = eqn.primitive.get_bind_params(eqn.params)
  return tracing.evaluate(eqn, operands, params)
