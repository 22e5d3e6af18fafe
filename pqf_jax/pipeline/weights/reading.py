"""Reads a weights file of any known kind."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import errors, models, pack
from pqf_jax.core import trees, vq_array
from pqf_jax.models import authors_files, torch_names
from pqf_jax.pipeline.weights import hub, torch_files
from pqf_jax.runtime import files, progress

PyTree = Any
READERS = {
  ".safetensors": torch_names.read_safetensors,
  **dict.fromkeys(
    (".pth", ".pt", ".pth.tar", ".ckpt", ".bin"), torch_files.read
  ),
}
# What wrappers of torch's modules put before every name: data parallelism,
# torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")


def read(
  source: str,
  model_name: str,
  template: PyTree,
  *,
  norm_epsilon: float | None,
  anew: Collection[str] = (),
) -> PyTree:
  """Reads the variables in a file, checked against the model.

  Args:
    source: a file, here or in a bucket (gs://...), or of the Hugging Face hub,
      `hf://OWNER/REPO[/FILE]`:
      `.safetensors`, packed by this library (compressed or dense) or with
      torch's names; or a file of torch.save, see `READERS`. Torch's names may
      all begin with `PREFIXES`, or be those of the authors' compressed
      networks, see `models.authors_files`.
    model_name: of the module under `pqf_jax.models` that knows torch's names.
    template: the model's variables as `jax.ShapeDtypeStruct`s.
    norm_epsilon: of the network's norms; None: it has none.
    anew: paths of variables that are zeros, whatever the file has in their
      place.

  Raises:
    InputError: no such file, damaged, with torch's names where the model knows
      none, with norms folded for another epsilon, or of another architecture:
      missing and extra names are listed.
  """
  path, suffix = _locate(source)
  header = pack.read_header(path) if suffix == ".safetensors" else None
  content = READERS[suffix](path) if header is None else pack.load(path)
  try:
    if header is not None:
      _check_epsilon(header["norm_epsilon"], norm_epsilon)
      return _fit_packed(content, template, anew)
    model = models.get_model(model_name)
    if not hasattr(model, "load_torch"):
      raise errors.InputError(
        f"the file has torch's names, which model {model_name!r} has no "
        "function load_torch to read; give a file that pqf_jax packed"
      )
    content = _without_prefixes(source, content, template)
    if anew:
      if hasattr(model, "arrange"):
        content = model.arrange(content)
      content |= {
        torch_names.torch_name(path): np.zeros(
          torch_names.torch_shape(path, leaf), np.float32
        )
        for path, leaf in trees.flatten(template).items()
        if path in anew
      }
    if not authors_files.is_authors_layout(content):
      return model.load_torch(content, template)
    if hasattr(model, "arrange"):
      content = model.arrange(content)
    # A network that names no epsilon has no norms.
    epsilon = 0.0 if norm_epsilon is None else norm_epsilon
    return authors_files.from_authors_layout(
      content, template, norm_epsilon=epsilon
    )
  except errors.InputError as error:
    raise errors.InputError(f"{source}: {error}") from error


def read_backbone(
  source: str,
  settings: Mapping[str, Any],
  template: PyTree,
  *,
  norm_epsilon: float | None,
  sample: Sequence[Any],
) -> dict[str, Any]:
  """Reads the layers that a network takes over from another one.

  That is the classifier around which it is built, or the same network with
  another number of classes, of which all is taken but what depends on them.

  Args:
    source: a trained classifier; see `read`.
    settings: name and arguments of the model. If its module has a function
      `backbone(**settings)`, this says which classifier it is built around and
      where that belongs.
    template: the model's variables as `jax.ShapeDtypeStruct`s.
    norm_epsilon: of the network's norms; None: it has none.
    sample: inputs of the network.

  Raises:
    InputError: the model has neither a backbone nor a number of classes, or the
      file holds another network.
  """
  arguments = dict(settings)
  name = arguments.pop("name")
  model = models.get_model(name)
  if not hasattr(model, "backbone"):
    if "num_classes" not in arguments:
      raise errors.InputError(
        f"config.backbone is {source!r}, but model {name!r} is not built "
        "around another network and has no num_classes; give --config.weights"
      )
    arguments["num_classes"] += 1
    more = model.make(**arguments).init
    head = _of_another_shape(
      template, jax.eval_shape(more, jax.random.key(0), *sample)
    )
    found = read(source, name, template, norm_epsilon=norm_epsilon, anew=head)
    taken = trees.flatten(vq_array.decode_params(found))
    progress.say(
      f"{source}: {len(taken) - len(head)} of {len(taken)} variables are taken "
      f"over, not {', '.join(head)}"
    )
    return {path: leaf for path, leaf in taken.items() if path not in head}
  classifier, prefix = model.backbone(**arguments)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(classifier.init, jax.random.key(0), images)
  variables = read(
    source, "resnet", shapes, norm_epsilon=classifier.norm_epsilon
  )
  found = {}
  for path, leaf in trees.flatten(vq_array.decode_params(variables)).items():
    collection, _, rest = path.partition("/")
    found[f"{collection}/{prefix}/{rest}"] = leaf
  wanted = trees.flatten(template)
  return {path: leaf for path, leaf in found.items() if path in wanted}


def _of_another_shape(template: PyTree, other: PyTree) -> list[str]:
  """Returns the paths of the template whose shapes differ in the other tree."""
  others = trees.flatten(other)
  return [
    path
    for path, leaf in trees.flatten(template).items()
    if path not in others or others[path].shape != leaf.shape
  ]


def _locate(source: str) -> tuple[str, str]:
  """Fetches a file of a known kind; returns its path and suffix."""
  known = ", ".join(READERS)
  fetch = hub.fetch if source.startswith(hub.SCHEME) else files.fetch
  path = fetch(source)
  name = os.path.basename(path)
  suffix = max((s for s in READERS if name.endswith(s)), key=len, default="")
  if not suffix:
    raise errors.InputError(
      f"{source} is of no known kind; weights are files named {known}, or "
      f"{hub.SCHEME}OWNER/REPO[/FILE]"
    )
  return path, suffix


def _without_prefixes(
  source: str, state_dict: torch_names.StateDict, template: PyTree
) -> torch_names.StateDict:
  """Takes prefixes off that all names have and the network's have not."""
  modules = {path.split("/")[1] for path in trees.flatten(template)}
  for prefix in PREFIXES * len(PREFIXES):
    ours = prefix.removesuffix(".") in modules
    if ours or not all(name.startswith(prefix) for name in state_dict):
      continue
    progress.say(f"{source}: {len(state_dict)} names without {prefix!r}")
    state_dict = {
      name.removeprefix(prefix): array for name, array in state_dict.items()
    }
  return state_dict


def _check_epsilon(
  stored: float | Mapping[str, float] | None, needed: float | None
) -> None:
  """Refuses norms that were folded for another epsilon than the network's."""
  folded = stored.values() if isinstance(stored, Mapping) else (stored,)
  others = sorted({value for value in folded if value not in (None, needed)})
  if others and needed is not None:
    raise errors.InputError(
      f"its norms are folded for epsilon {', '.join(map(str, others))}, but "
      f"those of the network have {needed}; choose the model that it was saved "
      "from, or save it again with norm_epsilon of that model"
    )


def _fit_packed(
  variables: PyTree, template: PyTree, anew: Collection[str]
) -> PyTree:
  """Returns the variables in the template's structure and types."""
  wanted = trees.flatten(template)
  zeros = {path: np.zeros(wanted[path].shape, np.float32) for path in anew}
  flat = trees.flatten(variables, vq_array.is_vq) | zeros
  torch_names.check_fit(
    flat,
    {path: tuple(leaf.shape) for path, leaf in wanted.items()},
    {
      path
      for path, leaf in wanted.items()
      if not jnp.issubdtype(leaf.dtype, jnp.floating)
    },
  )

  def cast(path: str) -> Any:
    leaf, dtype = flat[path], wanted[path].dtype
    if vq_array.is_vq(leaf):
      return leaf.replace(codebook=leaf.codebook.astype(dtype))
    return leaf.astype(dtype)

  return trees.replace(template, {path: cast(path) for path in wanted})
