"""ImageNet (ILSVRC 2012), prepared by tensorflow-datasets or in folders."""

from pqf_jax.data import locate, sources
from pqf_jax.data.datasets import imagenet_labels, imagenet_transforms

PREPARE_COMMAND = (
  "python -m pqf_jax.data.prepare imagenet2012 --from TARS --to {data_dir} "
  "where TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens ImageNet; see `imagenet_transforms` for sizes and crops."""
  copy = locate.open_copy(
    "imagenet2012",
    data_dir,
    prepare_command=PREPARE_COMMAND,
    class_names=imagenet_labels.class_names(),
  )
  return imagenet_transforms.make_dataset("imagenet2012", copy, image_size)
