"""Weights of Mask R-CNN under torchvision's names and in the authors' layout.

Variables have the names of torchvision's first weights:
`roi_heads.mask_head.mask_fcn1.weight` is
`params/roi_heads/mask_head/mask_fcn1/kernel`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pqf_jax import errors
from pqf_jax.core import trees
from pqf_jax.models import authors_files, torch_names
from pqf_jax.models.mask_rcnn import roi_heads

PyTree = Any
# Patterns of names that torchvision introduced later, and the first names.
RENAMED = (
  (r"(backbone\.fpn\.(inner|layer)_blocks\.\d+)\.0\.", r"\1."),
  (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
)
MASK_LAYER = re.compile(r"roi_heads\.mask_head\.(\d+)\.0\.")
DECONVOLUTION = "roi_heads.mask_predictor.conv5_mask"
DECONVOLUTION_TAPS = 4
BOX_HEAD = "roi_heads.box_head"


def load_torch(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps torchvision's state dict, with its first or later names, to variables.

  See `torch_names.torch_to_flax`.
  """
  arranged = arrange(state_dict)
  target, source = (f"{BOX_HEAD}.{layer}" for layer in ("fc6_hwc", "fc6"))
  path = f"params/{target.replace('.', '/')}/kernel"
  if path in trees.flatten(template) and f"{source}.weight" in arranged:
    weight = np.asarray(arranged.pop(f"{source}.weight"))
    positions = roi_heads.BOX_BINS**2
    by_channel = weight.reshape(len(weight), -1, positions)
    by_position = by_channel.swapaxes(1, 2).reshape(weight.shape)
    arranged[f"{target}.weight"] = by_position
    arranged[f"{target}.bias"] = arranged.pop(f"{source}.bias")
  return torch_names.torch_to_flax(arranged, template)


def arrange(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Restores torchvision's first names and transposes the deconvolution.

  Torch stores the kernel of a transposed convolution as [in, out, h, w], and
  the paper's authors store its codes as [in, out]; the result begins with the
  output, as for all other kernels. A second call on first names undoes the
  transposition.
  """
  arranged = {_first_name(name): array for name, array in state_dict.items()}
  for entry in (f"{DECONVOLUTION}.weight", DECONVOLUTION + authors_files.CODES):
    if entry in arranged:
      swapped = np.asarray(arranged[entry]).swapaxes(0, 1)
      # Safetensors writes arrays that are not contiguous in the wrong order.
      arranged[entry] = np.ascontiguousarray(swapped)
  return arranged


def to_authors_layout(
  variables: PyTree, *, norm_epsilon: float = 0.0
) -> torch_names.StateDict:
  """Maps variables to the authors' layout; see `authors_files`.

  `arrange` and `authors_files.from_authors_layout` read the result back. The
  file that the authors released for Mask R-CNN was not available: names, shapes
  and sizes follow their configuration, and whether their code accepts the
  result is not tested.

  Args:
    variables: with `VQArray`s; the transposed convolution may have sub-vectors
      of one channel only, since the authors' sub-vectors run over outputs.
    norm_epsilon: of the model's norms.

  Raises:
    InputError: the layout cannot hold a kernel.
  """
  arranged = authors_files.to_authors_layout(
    variables, norm_epsilon=norm_epsilon
  )
  codebook = arranged.get(DECONVOLUTION + authors_files.CODEBOOK)
  if codebook is not None and codebook.shape[1] != DECONVOLUTION_TAPS:
    raise errors.InputError(
      f"{DECONVOLUTION} has sub-vectors of {codebook.shape[1]} weights, but in "
      f"the authors' layout they run over outputs; use {DECONVOLUTION_TAPS} "
      "weights, that is one channel"
    )
  if f"{BOX_HEAD}.fc6_hwc.bias" in arranged:
    raise errors.InputError(
      "the authors' layout cannot hold fc6_layout='hwc'; use 'chw'"
    )
  return arrange(arranged)


def _first_name(name: str) -> str:
  for pattern, replacement in RENAMED:
    name = re.sub(pattern, replacement, name)
  return MASK_LAYER.sub(
    lambda match: f"roi_heads.mask_head.mask_fcn{int(match[1]) + 1}.", name
  )
