"""Permute, Quantize, Fine-tune (arXiv 2010.15703) for JAX and Flax.

    variables = pqf_jax.load("model.safetensors")    # a packed network
    logits = model.apply(variables, images)          # reads it as it is

    variables, report = pqf_jax.compress(            # a network of your own
        model.apply, variables, images, rules, key=jax.random.key(0))

Names are imported when first used, so that loading a file needs neither the
training code nor its libraries.
"""

import importlib
from typing import Any

_HOMES = {
  "BlockSpec": "core.blocks",
  "ChannelAxis": "core.channels",
  "InputError": "errors",
  "Rule": "core.plan",
  "VQArray": "core.vq_array",
  "annealed_kmeans": "kmeans",
  "apply_permutations": "core.channels",
  "compress": "compression",
  "decode_params": "core.vq_array",
  "discover_channels": "discovery.discover",
  "init_state": "finetune",
  "load": "pack",
  "make_finetune_step": "finetune",
  "make_plan": "core.plan",
  "merge_trainable": "core.vq_array",
  "pack_model": "pack",
  "permute_channels": "permute",
  "predict_size": "core.plan",
  "quantize_params": "quantize",
  "save": "pack",
  "split_trainable": "core.vq_array",
  "unpack_model": "pack",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'pqf_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"pqf_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
