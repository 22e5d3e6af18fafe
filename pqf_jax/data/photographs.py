"""Data sets of photographs, which are decoded each time they are read."""

from pqf_jax.data import decoding, sources, transforms

# Pixels of the short side, and of the crop, of ImageNet's usual preparation.
RESIZE, CROP = 256, 224
# Of ImageNet, whose weights most networks begin with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Images whose size is looked at.
NUM_MEASURED = 256


def usual(image_size: int | None) -> transforms.Preparation:
  """Returns ImageNet's preparation, scaled to an image size; None: 224.

  The short side is resized to 256; training crops of 224 pixels lie anywhere
  and are mirrored half the time (section 4.1 of arXiv 2010.15703); the test
  crop is in the middle.
  """
  size = image_size or CROP
  return transforms.Preparation(size * RESIZE // CROP, size, 0, "crop,flip")


def fitting(
  train: decoding.EncodedImages, image_size: int | None
) -> transforms.Preparation:
  """Returns the usual preparation, or one that leaves small images as they are.

  The median M of the short sides decides. Images are not enlarged beyond it,
  unless an image size asks for more; where the crop is then the whole image,
  its place varies by an eighth of it, as is usual for CIFAR-10.

  Args:
    train: training images.
    image_size: side of the crop; None: 224, or M where that is less.
  """
  median = _median_short_side(train)
  size = image_size or min(CROP, median)
  preparation = usual(size)
  resize = min(size * RESIZE // CROP, max(size, median))
  padding = size // 8 if resize == size else 0
  return preparation._replace(resize=resize, padding=padding)


def make_dataset(
  name: str,
  train: decoding.EncodedImages,
  test: decoding.EncodedImages,
  num_classes: int,
  preparation: transforms.Preparation,
) -> sources.ImageDataset:
  """Returns a data set with the mean and standard deviation of ImageNet."""
  return sources.prepare_images(
    preparation,
    name=name,
    train=lambda transform: decoding.for_training(
      train, num_classes, transform
    ),
    test=lambda transform: decoding.Records(test, num_classes, transform),
    num_classes=num_classes,
    mean=MEAN,
    std=STD,
  )


def _median_short_side(images: decoding.EncodedImages) -> int:
  """Returns the median over images evenly spaced; damaged ones do not count."""
  count = min(len(images), NUM_MEASURED)
  sides = []
  for number in range(count):
    try:
      data = images[number * len(images) // count].data
      sides.append(min(decoding.read_size(data)))
    except decoding.DamagedError:
      continue
  return sorted(sides)[len(sides) // 2] if sides else RESIZE
