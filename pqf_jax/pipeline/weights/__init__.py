"""Reads trained weights from files and from the hub, and writes torch's."""

from pqf_jax.pipeline.weights.reading import read as read
from pqf_jax.pipeline.weights.reading import read_backbone as read_backbone
from pqf_jax.pipeline.weights.writing import to_torch as to_torch
