import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from pqf_jax import data, errors
from pqf_jax.data.datasets import imagenet_labels


@pytest.fixture(scope="module")
def digits() -> data.ImageDataset:
  return data.get_dataset("digits")


def stack(source) -> tuple[np.ndarray, np.ndarray]:
  records = [source[i] for i in range(len(source))]
  return tuple(np.stack([r[name] for r in records]) for name in records[0])


def test_an_unknown_name_is_answered_with_the_nearest():
  with pytest.raises(
    errors.InputError,
    match="no data set .* 'cifar-10': did you mean 'cifar10'.*imagenet2012",
  ):
    data.get_dataset("cifar-10", data_dir="anything")


def load_toy(data_dir, image_size) -> data.ImageDataset:
  size = image_size or 4
  records = [
    {"image": np.full((size, size, 3), i, np.uint8), "label": i % 2}
    for i in range(6)
  ]
  return data.ImageDataset(
    name=f"toy in {data_dir}",
    train=records,
    test=records[:3],
    num_classes=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    augment=lambda image, draws: image,
  )


TOYS = {"toy": load_toy, "toy_module": types.SimpleNamespace(load=load_toy)}


@pytest.mark.parametrize("name", TOYS)
def test_a_data_set_is_registered_from_outside(name):
  data.register(name, TOYS[name])
  dataset = data.get_dataset(name, data_dir="DIR", image_size=8)
  assert dataset.name == "toy in DIR"
  (batch,) = data.train_batches(dataset, batch_size=6, seed=0, num_steps=1)
  assert batch["image"].shape == (6, 8, 8, 3)
  assert sorted(batch["image"][:, 0, 0, 0]) == list(range(6))
  with pytest.raises(errors.InputError, match=f"two .* named '{name}'"):
    data.register(name, "another.module")


def test_a_data_set_is_an_entry_point_of_another_package(tmp_path, monkeypatch):
  info = tmp_path / "toys-1.0.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Name: toys\nVersion: 1.0\n")
  (info / "entry_points.txt").write_text(
    "[pqf_jax.datasets]\ntoy_of_package = toys:load_small\n"
  )
  (tmp_path / "toys.py").write_text(
    "from pqf_jax import data\n"
    "def load_small(data_dir, image_size):\n"
    "  return data.get_dataset('digits', image_size=image_size or 8)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  dataset = data.get_dataset("toy_of_package")
  assert dataset.train[0]["image"].shape == (8, 8, 3)


def test_the_classes_are_the_sorted_wordnet_ids():
  names = imagenet_labels.class_names()
  assert len(set(names)) == 1000
  assert list(names) == sorted(names)
  # Known to whoever used the labels: tench, snail, banana, toilet paper.
  known = {0: "n01440764", 113: "n01944390", 954: "n07753592", 999: "n15075141"}
  assert {label: names[label] for label in known} == known


def test_validation_labels_are_those_of_the_development_kit():
  # The first five of ILSVRC2012_validation_ground_truth.txt, as sorted ids:
  # 490 361 171 822 297 there are n01751748, n09193705, n02105855, n04263257,
  # n03125729.
  first = [
    imagenet_labels.class_names()[
      imagenet_labels.validation_label(f"ILSVRC2012_val_{i:08d}.JPEG")
    ]
    for i in range(1, 6)
  ]
  assert first == [
    "n01751748",
    "n09193705",
    "n02105855",
    "n04263257",
    "n03125729",
  ]
  counts = np.bincount(
    [
      imagenet_labels.validation_label(f"ILSVRC2012_val_{i:08d}.JPEG")
      for i in range(1, 50_001)
    ]
  )
  assert counts.tolist() == [50] * 1000


@pytest.mark.parametrize(
  "name", ["ILSVRC2012_val_00050001.JPEG", "1.JPEG", "ILSVRC2012_val_1.JPEG"]
)
def test_other_names_have_no_label(name):
  with pytest.raises(errors.InputError, match=f"{name} is not the name"):
    imagenet_labels.validation_label(name)


def test_digits_split(digits):
  assert (len(digits.train), len(digits.test)) == (1437, 360)
  _, labels = datasets.load_digits(return_X_y=True)
  held_out = np.bincount(stack(digits.test)[1]) / np.bincount(labels)
  np.testing.assert_allclose(held_out, 0.2, atol=0.006)


def test_digits_are_the_scans_of_scikit_learn(digits):
  """Every image of both splits is one scan, enlarged, with its label."""
  ink, labels = datasets.load_digits(return_X_y=True)
  known = {}
  for scan, label in zip(ink.reshape(-1, 8, 8), labels, strict=True):
    pixels = np.floor(scan * 255 / 16 + 0.5).astype(np.uint8)
    large = Image.fromarray(pixels).resize((32, 32), Image.BILINEAR)
    known[np.asarray(large).tobytes()] = label
  images, labels_of_images = (
    np.concatenate(pair)
    for pair in zip(stack(digits.train), stack(digits.test), strict=True)
  )
  assert images.shape == (1797, 32, 32, 3)
  assert images.dtype == np.uint8
  assert images.min() == 0
  assert images.max() == 255
  np.testing.assert_array_equal(images[..., 0], images[..., 1])
  np.testing.assert_array_equal(images[..., 0], images[..., 2])
  expected = [known.pop(image[..., 0].tobytes()) for image in images]
  assert labels_of_images.tolist() == expected
  assert not known


def test_digits_are_normalized_by_their_own_statistics(digits):
  pixels = stack(digits.train)[0] / 255
  np.testing.assert_allclose(
    digits.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-3
  )
  np.testing.assert_allclose(digits.std, pixels.std(axis=(0, 1, 2)), atol=1e-3)


def test_digits_are_shifted_but_never_mirrored(digits):
  image = digits.train[0]["image"]
  rng = np.random.default_rng(0)
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  shifted = {
    padded[row : row + 32, column : column + 32].tobytes()
    for row in range(5)
    for column in range(5)
  }
  crops = {digits.augment(image, rng.random(3)).tobytes() for _ in range(500)}
  assert crops == shifted


def test_digits_in_another_size():
  assert data.get_dataset("digits", image_size=64).test[0]["image"].shape == (
    64,
    64,
    3,
  )


def test_digits_of_a_folder_are_refused():
  with pytest.raises(errors.InputError, match="data.dir is '/mine', but"):
    data.get_dataset("digits", data_dir="/mine")


def test_digits_are_the_same_in_every_run(digits):
  again = data.get_dataset("digits")
  for one, other in ((digits.train, again.train), (digits.test, again.test)):
    np.testing.assert_array_equal(stack(one)[0], stack(other)[0])


def test_data_is_imported_without_the_libraries_that_read_it():
  code = """
import sys
from pqf_jax import data
slow = {"grain", "sklearn", "tensorflow", "tensorflow_datasets"}
assert not slow & set(sys.modules), slow & set(sys.modules)
dataset = data.get_dataset("digits")
next(data.train_batches(dataset, batch_size=8, seed=0))
slow -= {"grain", "sklearn"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_shared_cifar10(shared_data):
  dataset = data.get_dataset("cifar10", data_dir=str(shared_data / "tfds"))
  assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
  images, labels = stack(dataset.train)
  assert images.shape == (50_000, 32, 32, 3)
  assert np.bincount(labels).tolist() == [5000] * 10
  # In steps of 5,000: float64 of all images would take 1.2 GB.
  means = [
    (images[i : i + 5000] / 255).mean(axis=(0, 1, 2))
    for i in range(0, 50_000, 5000)
  ]
  np.testing.assert_allclose(dataset.mean, np.mean(means, axis=0), atol=1e-3)
  batches = list(data.eval_batches(dataset, batch_size=384))
  assert sum(batch["mask"].sum() for batch in batches) == 10_000
  assert {batch["image"].shape for batch in batches} == {(384, 32, 32, 3)}


def test_shared_imagenet2012(shared_data):
  dataset = data.get_dataset("imagenet2012", data_dir=str(shared_data / "tfds"))
  assert (len(dataset.train), len(dataset.test)) == (3500, 500)
  assert dataset.num_classes == 1000
  batches = list(data.eval_batches(dataset, batch_size=128))
  mask = np.concatenate([batch["mask"] for batch in batches])
  labels = np.concatenate([batch["label"] for batch in batches])
  assert mask.sum() == 500
  classes, counts = np.unique(labels[mask > 0], return_counts=True)
  assert len(classes) == 10
  assert counts.tolist() == [50] * 10
  (batch,) = data.train_batches(dataset, batch_size=16, seed=0, num_steps=1)
  assert batch["image"].shape == (16, 224, 224, 3)
