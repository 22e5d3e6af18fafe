"""Training images a second of our loader and of torch's DataLoader.

    python -m benchmarks.loader --data-dir DIR [--photos 500x375]

DIR is a copy of imagenet2012 in any format. Both read the same files through
the same reader and make the same kind of batch on this machine's cores: decode,
short side 256, random crop of 224 pixels, mirror, uint8. Ours works in threads,
torch's (Pillow, crop and mirror on the Pillow image) in as many processes. They
take turns, so that other load on the machine slows both. The benchmark prints
medians and the median ratio, the time on all cores, which depends least on
other load, and the time of each part of one image. --photos first enlarges the
images to that size, a common one in ImageNet, as the copy may hold smaller
ones.
"""

import argparse
import gc
import io
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from pqf_jax import data
from pqf_jax.data import decoding, locate, transforms
from pqf_jax.data.datasets import imagenet2012, imagenet_labels

SHORT_SIDE, SIZE = 256, 224


def open_train(data_dir: str) -> decoding.EncodedImages:
  """Opens the encoded training images."""
  copy = locate.open_copy(
    "imagenet2012",
    data_dir,
    prepare_command=imagenet2012.PREPARE_COMMAND,
    class_names=imagenet_labels.class_names(),
  )
  return copy.split("train")


class TorchImages(torch.utils.data.Dataset):
  """Images as a training script on torch reads and transforms them."""

  def __init__(self, data_dir: str, length: int) -> None:
    self._data_dir = data_dir
    self._length = length
    self._images: decoding.EncodedImages | None = None

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
    if self._images is None:  # once in every worker
      self._images = open_train(self._data_dir)
    encoded = self._images[index]
    image = Image.open(io.BytesIO(encoded.data)).convert("RGB")
    image = transforms.resize_short_side(image, SHORT_SIDE)
    left, top = (int(torch.randint(side - SIZE + 1, ())) for side in image.size)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    if torch.rand(()) < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)), encoded.label


def enlarge(data_dir: str, folder: pathlib.Path, size: tuple[int, int]) -> None:
  """Writes the images as folders of JPEG files of this size."""
  images = open_train(data_dir)
  class_names = imagenet_labels.class_names()
  for split in ("train", "val"):
    for name in class_names:
      (folder / split / name).mkdir(parents=True)
  for index, encoded in enumerate(images.read_all()):
    class_name = class_names[encoded.label]
    image = decoding.open_image(encoded.data).resize(size)
    image.save(folder / "train" / class_name / f"{index}.JPEG", quality=92)
  # The reader needs images of every class.
  image = Image.new("RGB", size)
  for name in class_names:
    image.save(folder / "val" / name / "0.JPEG")
    if not any((folder / "train" / name).iterdir()):
      image.save(folder / "train" / name / "0.JPEG")


def compare(data_dir: str, batch_size: int, repeats: int) -> None:
  """Prints the images a second of both loaders."""
  dataset = data.get_dataset("imagenet2012", data_dir=data_dir)
  num_cores = len(os.sched_getaffinity(0))
  loaders = [
    torch.utils.data.DataLoader(
      TorchImages(data_dir, len(dataset.train)),
      batch_size,
      shuffle=True,
      drop_last=True,
      num_workers=num_cores,
      persistent_workers=True,
    )
  ]
  num_steps = len(dataset.train) // batch_size

  def ours() -> int:
    batches = data.train_batches(
      dataset, batch_size=batch_size, seed=0, num_steps=num_steps
    )
    return sum(len(batch["label"]) for batch in batches)

  def theirs() -> int:
    return sum(len(labels) for _, labels in loaders[0])

  rates: dict[str, list[float]] = {"ours": [], "torch": []}
  seconds = {"ours": 0.0, "torch": 0.0}  # of all cores
  for turn in range(repeats + 1):
    for name, run in (("ours", ours), ("torch", theirs)):
      start, start_cores = time.perf_counter(), time.process_time()
      count = run()
      seconds[name] += time.process_time() - start_cores
      if turn:  # the first turn starts workers and fills the disk's cache
        rates[name].append(count / (time.perf_counter() - start))
  loaders.clear()  # ends the workers, whose times are known after that
  gc.collect()
  workers = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds["torch"] += workers.ru_utime + workers.ru_stime
  ratios = [a / b for a, b in zip(rates["ours"], rates["torch"], strict=True)]
  num_images = num_steps * batch_size * (repeats + 1)
  print(f"{num_cores} cores, {num_steps} batches of {batch_size}, {repeats} x")
  print("| loader | images/s, median | lowest | highest | core ms an image |")
  print("|---|---|---|---|---|")
  for name, values in rates.items():
    print(
      f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} | "
      f"{max(values):.0f} | {seconds[name] / num_images * 1e3:.2f} |"
    )
  print(f"ours / torch: median of the turns {statistics.median(ratios):.2f}")


def break_down(data_dir: str, num_images: int) -> None:
  """Prints the milliseconds that each part takes for one image."""
  images = open_train(data_dir)
  indices = np.random.default_rng(0).integers(len(images), size=num_images)
  draws = np.random.default_rng(1).random((num_images, 3))
  print("| one image, one core | ms |")
  print("|---|---|")

  def timed(name: str, function: Callable, *items: list) -> list:
    times = []
    for _ in range(3):
      start = time.perf_counter()
      results = list(map(function, *items))
      times.append((time.perf_counter() - start) / num_images * 1e3)
    print(f"| {name} | {statistics.median(times):.3f} |")
    return results

  encoded = timed("read", lambda index: images[index].data, indices.tolist())
  decoded = timed("decode", decoding.open_image, encoded)
  resized = timed(
    "resize",
    lambda image: transforms.resize_short_side(image, SHORT_SIDE),
    decoded,
  )
  arrays = timed("to an array", np.asarray, resized)
  crops = timed(
    "crop and mirror",
    lambda image, drawn: transforms.random_crop(
      image, drawn, size=SIZE, padding=0, flip_probability=0.5
    ),
    arrays,
    list(draws),
  )
  batch = np.empty((num_images, SIZE, SIZE, 3), np.uint8)
  timed(
    "into the batch",
    lambda row, crop: np.copyto(batch[row], crop),
    list(range(num_images)),
    crops,
  )


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data-dir", required=True)
  parser.add_argument("--photos", help="WIDTHxHEIGHT")
  parser.add_argument("--batch-size", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=7)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    data_dir = options.data_dir
    if options.photos:
      width, height = map(int, options.photos.split("x"))
      enlarge(data_dir, pathlib.Path(folder), (width, height))
      data_dir = folder
    compare(data_dir, options.batch_size, options.repeats)
    break_down(data_dir, 300)


if __name__ == "__main__":
  main()
