"""ImageNet (ILSVRC 2012), prepared by tensorflow-datasets or in folders."""

from pqf_jax.data import locate, photographs, sources
from pqf_jax.data.datasets import imagenet_labels

PREPARE_COMMAND = (
  "python -m pqf_jax.data.prepare imagenet2012 --from TARS --to {data_dir} "
  "where TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens ImageNet, with the sizes and crops of `photographs.usual`."""
  copy = locate.open_copy(
    "imagenet2012",
    data_dir,
    prepare_command=PREPARE_COMMAND,
    layout=locate.image_folders(imagenet_labels.class_names()),
  )
  return photographs.make_dataset(
    "imagenet2012",
    copy.split("train"),
    copy.split("validation"),
    copy.num_classes,
    photographs.usual(image_size),
  )
