"""Image classification: loss, accuracy, data."""

from pqf_jax.tasks.classification.evaluation import make_count as make_count
from pqf_jax.tasks.classification.evaluation import (
  make_evaluate as make_evaluate,
)
from pqf_jax.tasks.classification.loss import make_loss as make_loss
from pqf_jax.tasks.classification.loss import make_teacher as make_teacher
from pqf_jax.tasks.classification.task import TASK as TASK
