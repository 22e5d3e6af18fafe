"""CIFAR-10: 50,000 + 10,000 images of 32 x 32 pixels."""

import functools

from pqf_jax.data import decoding, locate, sources, transforms

IMAGE_SIZE = 32
NUM_IMAGES = 60_000
PREPARE_COMMAND = (
  "where tensorflow is installed too, run "
  'python -c "import tensorflow_datasets as tfds; '
  "tfds.builder('cifar10', data_dir='{data_dir}', "
  "file_format='array_record').download_and_prepare()\""
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens CIFAR-10; all images are decoded at the first read, in 8 s."""
  size = image_size or IMAGE_SIZE
  sources.check_memory("cifar10", NUM_IMAGES, size)
  copy = locate.open_copy("cifar10", data_dir, prepare_command=PREPARE_COMMAND)
  resize = functools.partial(transforms.resize, size=size)
  train, test = (
    decoding.InMemory(make(copy.split(name), copy.num_classes, resize))
    for name, make in (
      ("train", decoding.for_training),
      ("test", decoding.Records),
    )
  )
  return sources.ImageDataset(
    name="cifar10",
    train=train,
    test=test,
    num_classes=copy.num_classes,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    # Four pixels, as is usual (He et al., arXiv 1512.03385, section 4.2).
    augment=functools.partial(
      transforms.random_crop,
      size=size,
      padding=size // 8,
      flip_probability=0.5,
    ),
    prepare=resize,
  )
