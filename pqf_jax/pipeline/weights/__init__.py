"""Reads trained weights from files and from the Hugging Face hub."""

from pqf_jax.pipeline.weights.reading import read as read
from pqf_jax.pipeline.weights.reading import read_backbone as read_backbone
