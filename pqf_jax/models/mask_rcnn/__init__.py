"""Mask R-CNN with a ResNet-FPN body, equal to torchvision's."""

from pqf_jax.models.mask_rcnn.network import backbone as backbone
from pqf_jax.models.mask_rcnn.network import make as make
from pqf_jax.models.mask_rcnn.weights import arrange as arrange
from pqf_jax.models.mask_rcnn.weights import load_torch as load_torch
from pqf_jax.models.mask_rcnn.weights import (
  to_authors_layout as to_authors_layout,
)
