import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from pqf_jax import data, errors
from tests.data import tiny_tfds

# What the message of a missing data set tells to run.
PREPARE = (
  "python -c \"import tensorflow_datasets as tfds; tfds.builder('cifar10', "
  "data_dir='{}', file_format='array_record').download_and_prepare()\""
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A data_dir with cifar10 and imagenet2012; to be read only."""
  folder = tmp_path_factory.mktemp("prepared")
  tiny_tfds.prepare(folder)
  return folder


@pytest.fixture
def spoiled(prepared: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of `prepared` that a test may spoil."""
  return pathlib.Path(shutil.copytree(prepared, tmp_path / "data"))


def all_records(source) -> list[dict]:
  return [source[i] for i in range(len(source))]


def edit(file: pathlib.Path, old: str, new: str) -> None:
  text = file.read_text()
  assert old in text
  file.write_text(text.replace(old, new))


def refusal(name: str, folder: object) -> str:
  with pytest.raises(errors.InputError) as caught:
    data.get_dataset(name, data_dir=None if folder is None else str(folder))
  return str(caught.value)


def test_cifar10_images_and_labels(prepared):
  dataset = data.get_dataset("cifar10", data_dir=str(prepared))
  for source, count in (
    (dataset.train, tiny_tfds.NUM_TRAIN),
    (dataset.test, tiny_tfds.NUM_TEST),
  ):
    found = all_records(source)
    assert len(source) == count
    assert sorted(record["label"] for record in found) == list(range(count))
    for record in found:
      np.testing.assert_array_equal(
        record["image"], tiny_tfds.flat_image(record["label"])
      )
  assert dataset.num_classes == tiny_tfds.NUM_TRAIN


def test_cifar10_augmentation_is_a_shift_by_four_and_a_mirror(prepared):
  dataset = data.get_dataset("cifar10", data_dir=str(prepared))
  rng = np.random.default_rng(0)
  image = rng.integers(1, 256, (32, 32, 3), dtype=np.uint8)
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
  possible = {
    padded[row : row + 32, column : column + 32][:, ::way].tobytes()
    for row in range(9)
    for column in range(9)
    for way in (1, -1)
  }
  crops = {dataset.augment(image, rng.random(3)).tobytes() for _ in range(2000)}
  assert crops == possible


def test_cifar10_batches(prepared):
  dataset = data.get_dataset("cifar10", data_dir=str(prepared))
  batches = list(data.train_batches(dataset, batch_size=5, seed=0, num_steps=4))
  for batch in batches:
    # A shifted flat image is black at the border and flat elsewhere.
    np.testing.assert_array_equal(
      batch["image"].max(axis=(1, 2, 3)), 10 * batch["label"] + 5
    )
  labels = np.concatenate([batch["label"] for batch in batches])
  assert sorted(labels) == list(range(tiny_tfds.NUM_TRAIN))


def test_cifar10_is_decoded_once(prepared):
  source = data.get_dataset("cifar10", data_dir=str(prepared)).train
  assert source[3]["image"] is source[3]["image"]


def test_imagenet_evaluation_is_resize_256_and_center_crop_224(prepared):
  dataset = data.get_dataset("imagenet2012", data_dir=str(prepared))
  found = all_records(dataset.test)
  assert sorted(r["label"] for r in found) == list(range(tiny_tfds.NUM_TEST))
  for record in found:
    file = tiny_tfds.encode(tiny_tfds.photo(record["label"]), "jpeg")
    image = Image.open(io.BytesIO(file)).convert("RGB")
    width, height = image.size
    if width < height:
      size = (256, int(256 * height / width))
    else:
      size = (int(256 * width / height), 256)
    left, top = (int(round((side - 224) / 2.0)) for side in size)
    expected = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
      record["image"], expected[top : top + 224, left : left + 224]
    )


def test_imagenet_training_is_a_crop_of_the_resized_image(prepared):
  dataset = data.get_dataset("imagenet2012", data_dir=str(prepared))
  image = dataset.train[0]["image"]
  assert min(image.shape[:2]) == 256
  crop = dataset.augment(image, np.array([0.5, 0.999, 0.75]))
  rows, columns = image.shape[0] - 223, image.shape[1] - 223
  np.testing.assert_array_equal(
    crop, image[rows // 2 : rows // 2 + 224, columns - 1 : columns + 223]
  )
  mirrored = dataset.augment(image, np.array([0.5, 0.999, 0.25]))
  np.testing.assert_array_equal(mirrored, crop[:, ::-1])
  (batch,) = data.train_batches(dataset, batch_size=6, seed=0, num_steps=1)
  assert batch["image"].shape == (6, 224, 224, 3)


def test_images_in_another_size(prepared):
  cifar10 = data.get_dataset("cifar10", data_dir=str(prepared), image_size=48)
  assert cifar10.test[0]["image"].shape == (48, 48, 3)
  imagenet = data.get_dataset(
    "imagenet2012", data_dir=str(prepared), image_size=112
  )
  assert imagenet.test[0]["image"].shape == (112, 112, 3)
  assert min(imagenet.train[0]["image"].shape[:2]) == 128


def test_the_newest_version_is_read(spoiled):
  folder = spoiled / "cifar10"
  newest = pathlib.Path(shutil.copytree(folder / "3.0.2", folder / "3.0.10"))
  shutil.copytree(folder / "3.0.2", folder / "incomplete.A3_9.0.0")
  (folder / "incomplete.A3_9.0.0" / "dataset_info.json").unlink()
  edit(newest / "dataset_info.json", '"3.0.2"', '"3.0.10"')
  edit(newest / "dataset_info.json", '"test"', '"other"')
  assert "3.0.10 has no split 'test', only" in refusal("cifar10", spoiled)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_folder_given(nothing):
  message = refusal("cifar10", nothing)
  assert "cifar10 needs data_dir (--config.data.dir)" in message
  assert PREPARE.format("DIR") in message


def test_a_folder_that_is_not_there(tmp_path):
  message = refusal("cifar10", tmp_path / "none")
  assert f"(not even a folder {tmp_path / 'none'})" in message
  assert PREPARE.format(tmp_path / "none") in message


def test_a_folder_without_the_data_set(tmp_path):
  message = refusal("imagenet2012", tmp_path)
  assert f"no {tmp_path}/imagenet2012/VERSION/dataset_info.json" in message
  assert "ILSVRC2012_img_val.tar" in message
  assert f"data_dir='{tmp_path}'" in message


@pytest.mark.parametrize("inner", ["cifar10", "cifar10/3.0.2"])
@pytest.mark.parametrize("relative", [False, True])
def test_an_inner_folder(prepared, monkeypatch, inner, relative):
  monkeypatch.chdir(prepared / inner)
  message = refusal("cifar10", "." if relative else prepared / inner)
  assert f"data_dir={prepared} has it: give that folder" in message


def test_a_preparation_that_was_interrupted(spoiled):
  (spoiled / "cifar10/3.0.2/dataset_info.json").unlink()
  message = refusal("cifar10", spoiled)
  assert f"no {spoiled}/cifar10/VERSION/dataset_info.json" in message
  assert PREPARE.format(spoiled) in message


def test_a_tfrecord_copy(spoiled):
  folder = spoiled / "cifar10/3.0.2"
  edit(folder / "dataset_info.json", '"array_record"', '"tfrecord"')
  for file in list(folder.glob("*.array_record-*")):
    file.rename(str(file).replace("array_record", "tfrecord"))
  message = refusal("cifar10", spoiled)
  assert f"{folder} is in the format tfrecord" in message
  # The same data_dir would be refused: the data set is there already.
  assert PREPARE.format(f"{spoiled}_array_record") in message


def test_a_copy_in_both_formats_is_read(spoiled):
  folder = spoiled / "cifar10/3.0.2"
  both = '"tfrecord", "alternativeFileFormats": ["array_record"]'
  edit(folder / "dataset_info.json", '"array_record"', both)
  dataset = data.get_dataset("cifar10", data_dir=str(spoiled))
  assert dataset.test[0]["image"].shape == (32, 32, 3)


def test_a_copy_that_lacks_a_file(spoiled):
  (file,) = (spoiled / "cifar10/3.0.2").glob("cifar10-train*")
  file.unlink()
  assert f"{file} is missing" in refusal("cifar10", spoiled)


def test_a_label_outside_the_classes(spoiled):
  for name in ("cifar10", "imagenet2012"):
    (file,) = (spoiled / name).glob("*/features.json")
    edit(file, f'"{tiny_tfds.NUM_TRAIN}"', '"19"')
    source = data.get_dataset(name, data_dir=str(spoiled)).train
    with pytest.raises(
      errors.InputError, match="image .* label 19, but .* classes 0 to 18"
    ):
      all_records(source)


def test_the_home_folder_is_understood(prepared, monkeypatch):
  monkeypatch.setenv("HOME", str(prepared.parent))
  dataset = data.get_dataset("cifar10", data_dir=f"~/{prepared.name}")
  assert len(dataset.train) == tiny_tfds.NUM_TRAIN


def test_the_info_file_is_what_tensorflow_datasets_writes(prepared):
  """The tests above spoil fields that must be there to be spoiled."""
  info = json.loads((prepared / "cifar10/3.0.2/dataset_info.json").read_text())
  assert info["fileFormat"] == "array_record"
