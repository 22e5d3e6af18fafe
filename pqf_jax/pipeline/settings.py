"""Checks every setting of a config by itself, before anything else is done.

What depends on data, devices or the network is checked by `job.prepare`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from pqf_jax import errors, permute, tasks
from pqf_jax.core import blocks
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages
from pqf_jax.data import transforms
from pqf_jax.data.formats import image_files
from pqf_jax.permutation import search

SEARCHES: dict[str, permute.Search] = {
  "assignment": search.search_permutation,
  "paper": search.search_like_authors,
  "none": search.keep_order,
}
# What `config.mode` may be, and what each does.
MODES = {
  "compress": "the whole job, from weights or training to a packed file",
  "train": "stage 0 alone, whose checkpoint other workdirs may begin with",
  "evaluate": "counts the accuracy of config.weights",
  "export": "writes config.weights dense, as safetensors with torch's names",
  "pack": "writes config.weights as a file of this library",
  "plan": "prints layers and sizes; needs data and weights to choose rules",
  "predict": "finds the objects of one image, config.image",
  "preflight": "compiles all for config.topology and prints what a chip needs",
}
CHOICES: Mapping[str, tuple[str, ...]] = {
  "mode": tuple(MODES),
  "distributed": ("auto", "off", "on"),
  "permute.search": tuple(SEARCHES),
  "norm_statistics": ("batch", "device"),
  "dtype": ("float32", "bfloat16"),  # float16 would need its losses scaled
  "finetune_from": ("calibrated", "quantized"),
  "pack": ("last", "best"),
  "data.augmentation": ("", *transforms.AUGMENTATIONS),
} | {f"storage.{name}": names for name, names in storages.CHOICES.items()}
MOST = 2**31 - 1
# Least and most of the numbers in `config.train` and `config.finetune`.
TRAINING = {
  "epochs": (0, MOST),
  "evaluation_epochs": (1, MOST),
  "batch_size": (1, MOST),
  "microbatches": (1, MOST),
  "base_batch_size": (0, MOST),
  "learning_rate": (0, 1e30),
  "final_learning_rate": (0, 1e30),
  "warmup_epochs": (0, MOST),
  "weight_decay": (0, 1),
  "momentum": (0, 1),
  "ema_decay": (0, 1 - 1e-6),
}
LIMITS: Mapping[str, tuple[float, float]] = {
  "seed": (0, 2**32 - 1),
  "distributed_timeout": (1, MOST),
  "compilation_cache_megabytes": (1, MOST),
  "model.num_classes": (0, 2**20),
  "data.image_size": (0, 2**14),
  "data.resize": (-1, 2**14),
  "data.crop": (0, 2**14),
  "data.padding": (-1, 2**14),
  "train.backbone_rate": (0, 1),
  "data.num_objects": (0, 2**14),
  "data.length": (0, 2**20),
  "target_bytes": (0, 2**50),
  "permute.kmeans_steps": (0, plans.MOST),
  "quantize.kmeans_steps": (1, plans.MOST),
  "calibrate.images": (0, 2**16),  # all are in memory
  "calibrate.rounds": (0, 1000),
  "calibrate.damping": (1e-9, 1),
  "distillation.share": (0, 1),
  "distillation.temperature": (1e-2, 1e3),
  "eval_batch_size": (1, 2**16),  # the last batch is padded to it
  "checkpoint_steps": (1, MOST),
} | {
  f"{stage}.{name}": limits
  for stage in ("train", "finetune")
  for name, limits in TRAINING.items()
}


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses settings that can never be right.

  Raises:
    InputError: names the setting, its value and those that it may have.
  """
  values = flatten(config.to_dict())
  for name, choices in CHOICES.items():
    if values[name] not in choices:
      raise errors.InputError(
        f"config.{name} is {values[name]!r}; it must be one of {choices}"
      )
  for name, (least, most) in LIMITS.items():
    value = values.get(name, least)  # a recipe may lack settings of a model
    if not least <= value <= most:  # NaN is refused too
      raise errors.InputError(
        f"config.{name} is {value!r}; give {least:g} to {most:g}"
      )
  task = tasks.get(config.task)
  if values.get("model.num_classes") == 0 and not hasattr(
    task, "count_classes"
  ):
    raise errors.InputError(
      f"config.model.num_classes is 0, but task {config.task!r} does not count "
      "classes; give their number"
    )
  _check_channel_values("mean", config.data.mean, 0)
  _check_channel_values("std", config.data.std, 1e-6)
  if config.data.unlabelled and config.mode != "preflight":
    image_files.unlabelled_folder(config.data.unlabelled)
  make_rules(config.rules)
  for pattern in config.frozen:
    plans.check_pattern("config.frozen", pattern)


def make_rules(given: Iterable[Any]) -> list[plans.Rule]:
  """Returns `config.rules`, or what a checkpoint has of them, as rules.

  Raises:
    InputError: names the rule and what is wrong with it.
  """
  rules = []
  for number, values in enumerate(given):
    if not isinstance(values, (tuple, list)) or not 2 <= len(values) <= 5:
      raise errors.InputError(
        f"config.rules[{number}] is {values!r}; a rule is (pattern, num_codes "
        "or None, channels a sub-vector, k-means steps, axes)"
      )
    rules.append(plans.Rule(*values[:4], *map(_make_axes, values[4:])))
    plans.check_rule(rules[-1])
  return rules


def _make_axes(value: Any) -> Any:
  """Returns axes that JSON has made lists; all else as it is."""
  lists = isinstance(value, (tuple, list)) and all(
    isinstance(part, (tuple, list)) for part in value
  )
  if not lists or not 2 <= len(value) <= 3:
    return value
  return blocks.KernelAxes(*map(tuple, value))


def make_storage(config: ml_collections.ConfigDict) -> storages.Storage:
  """Returns `config.storage` as a storage.

  Raises:
    InputError: names a type that it cannot have.
  """
  return storages.Storage(**config.storage)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Returns {'finetune.epochs': value, ...} of nested dicts."""
  if not isinstance(tree, dict):
    return {prefix.removesuffix("."): tree}
  flat: dict[str, Any] = {}
  for name, child in tree.items():
    flat |= flatten(child, f"{prefix}{name}.")
  return flat


def _check_channel_values(name: str, values: Any, least: float) -> None:
  good = [isinstance(v, (int, float)) and least <= v <= 1 for v in values]
  if len(good) not in (0, 3) or not all(good):
    raise errors.InputError(
      f"config.data.{name} is {tuple(values)}; give one value, {least:g} to 1, "
      "for each of red, green and blue, or none for those of the data set"
    )
