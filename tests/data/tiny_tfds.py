"""Small data sets in the files of tensorflow-datasets, without TensorFlow."""

import io
import json
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

NUM_TRAIN, NUM_TEST = 20, 7


def encode(image: Image.Image, encoding: str) -> bytes:
  file = io.BytesIO()
  image.save(file, encoding)
  return file.getvalue()


def flat_image(label: int) -> np.ndarray:
  """Makes a 32 x 32 image whose pixels all encode its label."""
  return np.full((32, 32, 3), 10 * label + 5, np.uint8)


def photo(index: int) -> Image.Image:
  """Makes a smooth picture of odd size; a third are gray, a third CMYK."""
  rng = np.random.default_rng(index)
  width, height = rng.integers(40, 90, 2)
  pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
  image = Image.fromarray(pixels).resize((width, height))
  return image.convert(("RGB", "L", "CMYK")[index % 3])


def write(
  folder: pathlib.Path, name: str, encoding: str, splits: dict[str, list[bytes]]
) -> None:
  """Prepares a data set; an image's label is its place in the list."""
  num_classes = max(map(len, splits.values()))

  class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("3.0.2")

    def _info(self) -> tfds.core.DatasetInfo:
      features = tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(None, None, 3), encoding_format=encoding
          ),
          "label": tfds.features.ClassLabel(num_classes=num_classes),
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: object) -> dict:
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
      for i, image in enumerate(splits[split]):
        yield i, {"image": io.BytesIO(image), "label": i}

  Builder.name = name
  builder = Builder(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()


def prepare(folder: pathlib.Path) -> None:
  """Makes cifar10 and imagenet2012 in this data_dir."""
  flat = [
    encode(Image.fromarray(flat_image(i)), "png") for i in range(NUM_TRAIN)
  ]
  photos = [encode(photo(i), "jpeg") for i in range(NUM_TRAIN)]
  with tfds.core.registered.skip_registration():
    for name, encoding, test, images in (
      ("cifar10", "png", "test", flat),
      ("imagenet2012", "jpeg", "validation", photos),
    ):
      splits = {"train": images, test: images[:NUM_TEST]}
      write(folder, name, encoding, splits)


def crc32c(data: bytes) -> int:
  """Computes CRC-32C bit by bit, as RFC 3720 defines it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def framed(record: bytes) -> bytes:
  """Frames a record as TFRecord files do."""

  def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)

  length = struct.pack("<Q", len(record))
  return length + masked(length) + record + masked(record)


def to_tfrecord(folder: pathlib.Path, num_shards: int = 3) -> None:
  """Rewrites a version of a data set as if made with the default format."""
  info = json.loads((folder / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    name = f"{info['name']}-{split['name']}"
    (file,) = folder.glob(f"{name}.array_record-*")
    reader = array_record_module.ArrayRecordReader(str(file))
    records = reader.read_all()
    cuts = np.array_split(np.arange(len(records)), num_shards)
    split["shardLengths"] = [str(len(cut)) for cut in cuts]
    for i, cut in enumerate(cuts):
      shard = folder / f"{name}.tfrecord-{i:05d}-of-{num_shards:05d}"
      shard.write_bytes(b"".join(framed(records[j]) for j in cut))
    file.unlink()
  (folder / "dataset_info.json").write_text(json.dumps(info))
