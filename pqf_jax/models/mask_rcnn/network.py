"""Mask R-CNN with ResNet-FPN (arXiv 1703.06870), equal to torchvision's.

Variables have the names of torchvision's first weights:
`roi_heads.mask_head.mask_fcn1.weight` is
`params/roi_heads/mask_head/mask_fcn1/kernel`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pqf_jax import errors
from pqf_jax.core import trees
from pqf_jax.models import authors_files, layers, resnet, torch_names
from pqf_jax.models.mask_rcnn import detector, fpn, roi_heads

PyTree = Any
Detections = detector.Detections
TrainingOutputs = detector.TrainingOutputs
ANCHOR_SIZES = ((32,), (64,), (128,), (256,), (512,))
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
# torchvision named these layers anew; the first names are kept here.
RENAMED = (
  (r"(backbone\.fpn\.(inner|layer)_blocks\.\d+)\.0\.", r"\1."),
  (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
)
MASK_LAYER = re.compile(r"roi_heads\.mask_head\.(\d+)\.0\.")
DECONVOLUTION = "roi_heads.mask_predictor.conv5_mask"
DECONVOLUTION_TAPS = 4
BOX_HEAD = "roi_heads.box_head"
FC6_LAYOUTS = {"chw": "fc6", "hwc": "fc6_hwc"}


def make(
  *,
  num_classes: int,
  min_size: int = 800,
  max_size: int = 1333,
  canvas: tuple[int, int] | None = None,
  depth: int = 50,
  norm_epsilon: float = 0.0,
  fc6_layout: str = "chw",
  anchor_sizes: Sequence[Sequence[int]] = ANCHOR_SIZES,
  anchor_ratios: Sequence[float] = ANCHOR_RATIOS,
  num_proposals: int = 1000,
  num_training_proposals: int = 2000,
  num_detections: int = 100,
  score_threshold: float = 0.05,
  dtype: DTypeLike = jnp.float32,
) -> detector.MaskRCNN:
  """Builds the network.

  Args:
    num_classes: with background, which is class 0: 91 for COCO.
    min_size: what the short side of images is scaled to.
    max_size: bound of the long side.
    canvas: height and width of what the network reads, multiples of 32. None:
      the square that every scaled image fits into. Where all images of a batch
      lie on the same side, (min_size, max_size) rounded up to multiples of 32
      is enough and takes 60 % of the time; what exceeds it is lost.
    depth: of the ResNet; see `resnet.make`.
    norm_epsilon: of the ResNet's norms: 0 in torchvision's COCO_V1 weights,
      1e-5 in others.
    fc6_layout: order of the rows of the first dense layer: torch's 'chw', or
      'hwc', in which 16 channels of one position are a sub-vector.
    anchor_sizes: for each of the five maps.
    anchor_ratios: heights over widths.
    num_proposals: boxes to look at.
    num_training_proposals: boxes that samples are drawn of in training.
    num_detections: bound of the objects of an image.
    score_threshold: what the probability of a class must exceed.
    dtype: floating type of the computation; boxes have at least float32.

  Raises:
    InputError: settings that cannot be.
  """
  fallback = fpn.padded(max(min_size, max_size))
  canvas = (fallback, fallback) if canvas is None else tuple(canvas)
  sizes = tuple(tuple(row) for row in anchor_sizes)
  if len(canvas) != 2 or any(side < 1 or side % fpn.STRIDE for side in canvas):
    raise errors.InputError(
      f"Mask R-CNN has no canvas={canvas}; give height and width, multiples of "
      f"{fpn.STRIDE}, such as ({fallback}, {fallback})"
    )
  if len(sizes) != len(ANCHOR_SIZES) or len({len(row) for row in sizes}) != 1:
    raise errors.InputError(
      f"Mask R-CNN has no anchor_sizes={sizes}; give {len(ANCHOR_SIZES)} rows "
      f"of one length, such as {ANCHOR_SIZES}"
    )
  layers.check_choice("Mask R-CNN", "depth", depth, tuple(resnet.DEPTHS))
  layers.check_choice(
    "Mask R-CNN", "fc6_layout", fc6_layout, tuple(FC6_LAYOUTS)
  )
  layers.check_settings("Mask R-CNN", num_classes, dtype)
  return detector.MaskRCNN(
    num_classes,
    min_size,
    max_size,
    canvas,
    depth,
    norm_epsilon,
    FC6_LAYOUTS[fc6_layout],
    sizes,
    tuple(anchor_ratios),
    num_proposals,
    num_training_proposals,
    num_detections,
    score_threshold,
    dtype,
  )


def backbone(*, depth: int = 50, **settings: Any) -> tuple[resnet.ResNet, str]:
  """The ImageNet classifier that the body is, and the body's path.

  Args:
    depth: as in `make`.
    **settings: the others of `make`; they change nothing here.
  """
  del settings
  return resnet.make(depth=depth, num_classes=1000), "backbone/body"


def load_torch(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Variables from torchvision's state dict, of either generation of names.

  See `torch_weights.torch_to_flax`.
  """
  arranged = arrange(state_dict)
  name, source = (f"{BOX_HEAD}.{layer}" for layer in ("fc6_hwc", "fc6"))
  path = f"params/{name.replace('.', '/')}/kernel"
  if path in trees.flatten(template) and f"{source}.weight" in arranged:
    weight = np.asarray(arranged.pop(f"{source}.weight"))
    positions = roi_heads.BOX_BINS**2
    by_channel = weight.reshape(len(weight), -1, positions)
    by_position = by_channel.swapaxes(1, 2).reshape(weight.shape)
    arranged[f"{name}.weight"] = by_position
    arranged[f"{name}.bias"] = arranged.pop(f"{source}.bias")
  return torch_names.torch_to_flax(arranged, template)


def arrange(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Torchvision's first names, and the transposed convolution as others.

  Torch has its kernel as [in, out, h, w], and the authors of the paper its
  codes as [in, out]; here both begin with the output. Done twice to the first
  names, it changes nothing.
  """
  arranged = {_first_name(name): array for name, array in state_dict.items()}
  for entry in (f"{DECONVOLUTION}.weight", DECONVOLUTION + authors_files.CODES):
    if entry in arranged:
      swapped = np.asarray(arranged[entry]).swapaxes(0, 1)
      # Safetensors writes the bytes of other arrays in disorder.
      arranged[entry] = np.ascontiguousarray(swapped)
  return arranged


def to_authors_layout(
  variables: PyTree, *, norm_epsilon: float = 0.0
) -> torch_names.StateDict:
  """The state dict of the authors' layout; see `official.to_authors_layout`.

  `arrange` and `official.from_authors_layout` read it back. Their released file
  could not be had: names, shapes and sizes are those of their configuration,
  and what their code makes of them is not tested.

  Args:
    variables: with `VQArray`s; the transposed convolution may have sub-vectors
      of one channel only, since theirs run over the outputs.
    norm_epsilon: of the model's norms.

  Raises:
    InputError: a kernel that the layout cannot hold.
  """
  arranged = authors_files.to_authors_layout(
    variables, norm_epsilon=norm_epsilon
  )
  codes = arranged.get(DECONVOLUTION + authors_files.CODES)
  codebook = arranged.get(DECONVOLUTION + authors_files.CODEBOOK)
  if codes is not None and codebook.shape[1] != DECONVOLUTION_TAPS:
    raise errors.InputError(
      f"{DECONVOLUTION} has sub-vectors of {codebook.shape[1]} weights, but "
      f"the authors' run over outputs; give it {DECONVOLUTION_TAPS}, that is "
      "one channel"
    )
  if f"{BOX_HEAD}.fc6_hwc.bias" in arranged:
    raise errors.InputError(
      "fc6_layout='hwc' has no place in the authors' layout; use 'chw'"
    )
  return arrange(arranged)


def _first_name(name: str) -> str:
  for pattern, replacement in RENAMED:
    name = re.sub(pattern, replacement, name)
  return MASK_LAYER.sub(
    lambda found: f"roi_heads.mask_head.mask_fcn{int(found[1]) + 1}.", name
  )
