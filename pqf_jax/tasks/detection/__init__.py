"""Object detection and instance segmentation: losses, AP, predictions."""

from pqf_jax.tasks.detection.loss import compute_losses as compute_losses
from pqf_jax.tasks.detection.loss import follow_teacher as follow_teacher
from pqf_jax.tasks.detection.loss import make_loss as make_loss
from pqf_jax.tasks.detection.loss import make_teacher as make_teacher
from pqf_jax.tasks.detection.task import TASK as TASK
