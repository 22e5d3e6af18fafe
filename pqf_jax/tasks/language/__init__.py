"""Language models: how well they predict the next token."""

from pqf_jax.tasks.language.task import TASK as TASK
