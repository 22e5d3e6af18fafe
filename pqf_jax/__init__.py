"""Permute, Quantize, Fine-tune (arXiv 2010.15703) for JAX and Flax.

    result = pqf_jax.compress(
      model.apply, variables, images, rules, key=jax.random.key(0)
    )
    # The epsilon of the network's batch norms, which the file folds.
    pqf_jax.save("model.safetensors", result.variables, norm_epsilon=1e-5)

    variables = pqf_jax.load("model.safetensors")
    logits = model.apply(variables, images)  # kernels stay compressed in memory

Names are imported when first used, so that loading a file needs neither the
training code nor its libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of `_NAMES`, for editors and type checkers
  from pqf_jax.budget import Allocation as Allocation
  from pqf_jax.budget import allocate_bytes as allocate_bytes
  from pqf_jax.budget import auto_rules as auto_rules
  from pqf_jax.calibrate import LayerError as LayerError
  from pqf_jax.calibrate import calibrate_params as calibrate_params
  from pqf_jax.compression import Compressed as Compressed
  from pqf_jax.compression import compress as compress
  from pqf_jax.core.blocks import BlockSpec as BlockSpec
  from pqf_jax.core.blocks import KernelAxes as KernelAxes
  from pqf_jax.core.channels import ChannelAxis as ChannelAxis
  from pqf_jax.core.channels import apply_permutations as apply_permutations
  from pqf_jax.core.modules import Inputs as Inputs
  from pqf_jax.core.plan import CompressionPlan as CompressionPlan
  from pqf_jax.core.plan import LayerPlan as LayerPlan
  from pqf_jax.core.plan import Rule as Rule
  from pqf_jax.core.plan import SizeReport as SizeReport
  from pqf_jax.core.plan import make_plan as make_plan
  from pqf_jax.core.plan import predict_size as predict_size
  from pqf_jax.core.storage import Storage as Storage
  from pqf_jax.core.vq_array import VQArray as VQArray
  from pqf_jax.core.vq_array import decode_params as decode_params
  from pqf_jax.core.vq_array import merge_trainable as merge_trainable
  from pqf_jax.core.vq_array import split_trainable as split_trainable
  from pqf_jax.discovery.discover import discover_channels as discover_channels
  from pqf_jax.discovery.kernels import find_kernels as find_kernels
  from pqf_jax.errors import InputError as InputError
  from pqf_jax.exporting import export as export
  from pqf_jax.finetune import FinetuneState as FinetuneState
  from pqf_jax.finetune import LossFn as LossFn
  from pqf_jax.finetune import cosine_adam as cosine_adam
  from pqf_jax.finetune import init_state as init_state
  from pqf_jax.finetune import make_finetune_step as make_finetune_step
  from pqf_jax.finetune import state_variables as state_variables
  from pqf_jax.inspection import Inspection as Inspection
  from pqf_jax.inspection import inspect as inspect
  from pqf_jax.kmeans import KMeansResult as KMeansResult
  from pqf_jax.kmeans import annealed_kmeans as annealed_kmeans
  from pqf_jax.pack import PackedModel as PackedModel
  from pqf_jax.pack import load as load
  from pqf_jax.pack import pack_model as pack_model
  from pqf_jax.pack import save as save
  from pqf_jax.pack import unpack_model as unpack_model
  from pqf_jax.permute import GroupReport as GroupReport
  from pqf_jax.permute import permute_channels as permute_channels
  from pqf_jax.quantize import LayerSummary as LayerSummary
  from pqf_jax.quantize import quantize_params as quantize_params
  from pqf_jax.rules import paper_large as paper_large
  from pqf_jax.rules import paper_small as paper_small

__version__ = "0.1.0"

_NAMES = {  # by module
  "budget": "Allocation allocate_bytes auto_rules",
  "calibrate": "LayerError calibrate_params",
  "compression": "Compressed compress",
  "core.blocks": "BlockSpec KernelAxes",
  "core.channels": "ChannelAxis apply_permutations",
  "core.modules": "Inputs",
  "core.plan": "CompressionPlan LayerPlan Rule SizeReport make_plan "
  "predict_size",
  "core.storage": "Storage",
  "core.vq_array": "VQArray decode_params merge_trainable split_trainable",
  "discovery.discover": "discover_channels",
  "discovery.kernels": "find_kernels",
  "errors": "InputError",
  "exporting": "export",
  "finetune": "FinetuneState LossFn cosine_adam init_state make_finetune_step "
  "state_variables",
  "inspection": "Inspection inspect",
  "kmeans": "KMeansResult annealed_kmeans",
  "pack": "PackedModel load pack_model save unpack_model",
  "permute": "GroupReport permute_channels",
  "quantize": "LayerSummary quantize_params",
  "rules": "paper_large paper_small",
}
_HOMES = {name: home for home in _NAMES for name in _NAMES[home].split()}
__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # else type checkers would accept every name

  def __getattr__(name: str) -> Any:
    if name not in _HOMES:
      raise AttributeError(f"module 'pqf_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pqf_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
