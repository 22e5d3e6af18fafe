"""Sentence embeddings: how near they are to those of the dense network."""

from pqf_jax.tasks.embedding.task import TASK as TASK
