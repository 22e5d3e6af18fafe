"""Detection data in COCO's layout: annotations, masks, images, batches."""

from pqf_jax.data.coco.dataset import DetectionDataset as DetectionDataset
from pqf_jax.data.coco.dataset import Labels as Labels
from pqf_jax.data.coco.dataset import Split as Split
from pqf_jax.data.coco.dataset import load as load
from pqf_jax.data.coco.dataset import unnamed_labels as unnamed_labels
