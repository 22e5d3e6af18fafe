"""Object detection and instance segmentation: losses, AP, predictions."""

from pqf_jax.tasks.detection.loss import compute_losses as compute_losses
from pqf_jax.tasks.detection.loss import make_loss as make_loss
from pqf_jax.tasks.detection.task import TASK as TASK
