"""CIFAR-10: 50,000 + 10,000 images of 32 x 32 pixels."""

from pqf_jax.data import decoding, locate, sources, transforms
from pqf_jax.data.formats import cifar_batches, tfds_folder

IMAGE_SIZE = 32
NUM_IMAGES = 60_000
PREPARE_COMMAND = (
  "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html "
  "into {data_dir}, or " + tfds_folder.prepare_command("cifar10")
)
ARCHIVE = locate.Layout(
  " or ".join(form.archive for form in cifar_batches.FORMS),
  cifar_batches.is_in,
  cifar_batches.Batches,
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens CIFAR-10; all images are decoded at the first read, in 8 s."""
  size = image_size or IMAGE_SIZE
  copy = locate.open_copy(
    "cifar10", data_dir, prepare_command=PREPARE_COMMAND, layout=ARCHIVE
  )
  train, test = copy.split("train"), copy.split("test")
  return sources.prepare_images(
    # Four pixels, as is usual (He et al., arXiv 1512.03385, section 4.2).
    transforms.Preparation((size, size), size, size // 8, "crop,flip"),
    name="cifar10",
    train=lambda transform: decoding.InMemory(
      decoding.for_training(train, copy.num_classes, transform)
    ),
    test=lambda transform: decoding.InMemory(
      decoding.Records(test, copy.num_classes, transform)
    ),
    num_classes=copy.num_classes,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    num_in_memory=NUM_IMAGES,
  )
