"""ImageNet (ILSVRC 2012), as prepared by tensorflow-datasets or in folders."""

from pqf_jax.data import locate, sources
from pqf_jax.data.datasets import ilsvrc, photos

PREPARE = (
  "python -m pqf_jax.data.prepare imagenet2012 --from TARS --to {data_dir} "
  "where TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """See `photos.make_dataset` and `pqf_jax.data.get_dataset`."""
  copy = locate.open_copy(
    "imagenet2012",
    data_dir,
    prepare=PREPARE,
    class_names=ilsvrc.class_names(),
  )
  return photos.make_dataset("imagenet2012", copy, image_size)
