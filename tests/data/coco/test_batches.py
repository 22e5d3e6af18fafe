import os

import numpy as np
import pytest
from PIL import Image

from pqf_jax import data, errors
from pqf_jax.data import coco
from pqf_jax.data.coco import batches as detection_batches
from tests.data.coco import tiny_coco

BATCH = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> coco.DetectionDataset:
  folder = tiny_coco.write(tmp_path_factory.mktemp("coco") / "tiny")
  return coco.load(str(folder), num_classes=4, with_train=True, num_objects=5)


def train(dataset, num_steps: int, **settings) -> list[dict]:
  settings = {"batch_size": BATCH, "seed": 3} | settings
  return list(data.train_batches(dataset, num_steps=num_steps, **settings))


def evaluate(dataset, **settings) -> list[dict]:
  return list(data.eval_batches(dataset, **settings))


def assert_same(left: list[dict], right: list[dict]) -> None:
  assert len(left) == len(right) > 0
  for one, other in zip(left, right, strict=True):
    assert one.keys() == other.keys()
    for name, values in one.items():
      np.testing.assert_array_equal(values, other[name])


def test_shapes_and_types(dataset):
  (batch,) = train(dataset, 1)
  side, most = 96, 5
  expected = {
    "image": ((BATCH, side, side, 3), np.uint8),
    "size": ((BATCH, 2), np.int32),
    "image_id": ((BATCH,), np.int64),
    "boxes": ((BATCH, most, 4), np.float32),
    "labels": ((BATCH, most), np.int32),
    "valid": ((BATCH, most), bool),
    "masks": ((BATCH, most, side, side // 8), np.uint8),
  }
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == expected


def test_boxes_and_masks_lie_on_their_objects_mirrored_or_not(dataset):
  mirrored = []
  for batch in train(dataset, 20):
    for row, image_id in enumerate(batch["image_id"].tolist()):
      index = image_id - 10
      height, width = tiny_coco.SIZES[index]
      assert batch["size"][row].tolist() == [height, width]
      image = batch["image"][row]
      assert not image[height:].any()
      assert not image[:, width:].any()
      plain = tiny_coco.pixels(index)
      flipped = not np.array_equal(image[:height, :width], plain)
      mirrored.append(flipped)
      if flipped:
        np.testing.assert_array_equal(image[:height, :width], plain[:, ::-1])
      assert batch["valid"][row].tolist() == [True] * 3 + [False] * 2
      assert not batch["boxes"][row, 3:].any()
      assert not batch["labels"][row, 3:].any()
      masks = np.unpackbits(batch["masks"][row], axis=-1).astype(bool)
      assert not masks[3:].any()
      for number in range(2):
        # The objects were drawn in these shades, see tiny_coco.pixels.
        drawn = (image == 120 + 60 * number).all(axis=-1)
        np.testing.assert_array_equal(masks[number], drawn)
        x, y, w, h = tiny_coco.box_of(drawn)
        assert batch["boxes"][row, number].tolist() == [x, y, x + w, y + h]
      x1 = 3 if flipped else width - 12.5
      np.testing.assert_array_equal(
        batch["boxes"][row, 2], np.float32([x1, 2, x1 + 9.5, 8])
      )
  # 40 tosses: 9 to 31 but once in three thousand.
  assert 9 <= sum(mirrored) <= 31


def test_mirroring_twice_is_nothing(dataset):
  pixels, targets = dataset.train.pixels(0), dataset.train.targets(0)
  once = detection_batches.mirror(pixels, targets)
  twice = detection_batches.mirror(*once)
  assert not np.array_equal(once[0], pixels)
  np.testing.assert_array_equal(twice[0], pixels)
  for left, right in zip(twice[1], targets, strict=True):
    np.testing.assert_array_equal(left, right)


def test_a_resumed_run_gets_exactly_the_batches_that_remain(dataset):
  whole = train(dataset, 8)
  for start in (1, 4, 7):
    assert_same(train(dataset, 8 - start, start_step=start), whole[start:])


def test_the_shares_of_the_processes_are_the_batch_of_one(dataset):
  def join(shares):
    return [
      {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
      for batches in zip(*shares, strict=True)
    ]

  share = [{"process_index": i, "process_count": 2} for i in range(2)]
  trained = [train(dataset, 3, **one) for one in share]
  assert_same(join(trained), train(dataset, 3))
  evaluated = [evaluate(dataset, batch_size=2, **one) for one in share]
  assert_same(join(evaluated), evaluate(dataset, batch_size=2))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_evaluation_counts_every_image_once_and_in_order(dataset, batch_size):
  batches = evaluate(dataset, batch_size=batch_size)
  assert {b["image"].shape for b in batches} == {(batch_size, 96, 96, 3)}
  mask = np.concatenate([b["mask"] for b in batches])
  image_id = np.concatenate([b["image_id"] for b in batches])
  assert mask.dtype == np.float32
  assert mask.tolist() == [1.0] * 3 + [0.0] * (len(mask) - 3)
  assert image_id[mask == 1].tolist() == [10, 11, 12]


def test_one_image_file_is_a_batch(tmp_path, dataset):
  path = tmp_path / "gray.jpg"
  Image.new("L", (50, 20), 77).save(path)
  batch = detection_batches.image_batch(path)
  assert batch.keys() == evaluate(dataset, batch_size=1)[0].keys()
  assert batch["image"].shape == (1, 64, 64, 3)
  assert batch["size"].tolist() == [[20, 50]]
  assert (batch["image"][0, :20, :50] == 77).all()
  assert batch["image"].sum() == 77 * 20 * 50 * 3
  with pytest.raises(
    errors.InputError, match="the image .*lost.png cannot .*it is missing"
  ):
    detection_batches.image_batch(tmp_path / "lost.png")


def test_one_image_file_is_turned_as_viewers_turn_it(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("L", (50, 20), 77).save(tmp_path / "turned.jpg", exif=exif)
  batch = detection_batches.image_batch(tmp_path / "turned.jpg")
  assert batch["size"].tolist() == [[50, 20]]


def test_a_pipe_is_no_image_file(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  with pytest.raises(errors.InputError, match="pipe.png .* a regular file"):
    detection_batches.image_batch(tmp_path / "pipe.png")


def test_a_batch_larger_than_the_data_set_is_refused(dataset):
  with pytest.raises(errors.InputError, match="4 images .* the 3 training"):
    train(dataset, 1, batch_size=4)


def test_training_images_must_have_been_opened(dataset):
  with pytest.raises(errors.InputError, match="without its training images"):
    train(dataset._replace(train=None), 1)
