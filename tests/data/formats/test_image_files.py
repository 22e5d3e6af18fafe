import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from pqf_jax import data, errors
from tests.data import tiny_imagenet, tiny_tfds

CLASSES = ("ant", "bee", "Cat")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """All 1,000 classes; to be read only."""
  folder = tmp_path_factory.mktemp("imagenet")
  tiny_imagenet.make_folders(folder)
  return folder


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
  """Three classes, of which train has 4, 5 and 6 images and val 2 each."""
  for split in ("train", "val"):
    for label, name in enumerate(CLASSES):
      folder = tmp_path / split / name
      folder.mkdir(parents=True)
      for i in range(label + 4 if split == "train" else 2):
        image = tiny_tfds.encode(tiny_tfds.photo(10 * label + i), "jpeg")
        (folder / f"{i}.{('JPEG', 'jpg')[i % 2]}").write_bytes(image)
  return tmp_path


def refusal(name: str, folder: object) -> str:
  with pytest.raises(errors.InputError) as caught:
    data.get_dataset(name, data_dir=None if folder is None else str(folder))
  return str(caught.value)


def test_imagenet_in_folders(imagenet):
  dataset = data.get_dataset("imagenet2012", data_dir=str(imagenet))
  assert (len(dataset.train), len(dataset.test)) == (1000, 1000)
  assert dataset.num_classes == 1000
  for label in (0, 1, 499, 999):
    record = dataset.train[label]
    assert record["label"] == label
    assert record["image"].shape == (256, 384, 3)
    assert record["image"][0, 0].tolist() == [
      *tiny_imagenet.color(label, "train")
    ]
  for index in range(0, 1000, 50):
    record = dataset.test[index]
    expected = tiny_imagenet.color(record["label"], "val")
    assert record["image"].shape == (224, 224, 3)
    assert record["image"][0, 0].tolist() == [*expected]


def test_the_folder_of_the_test_images_may_be_named_validation(photos):
  (photos / "val").rename(photos / "validation")
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  assert len(dataset.test) == 6


def test_images_and_labels_of_any_classes(photos):
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  assert dataset.num_classes == 3
  train = [dataset.train[i]["label"] for i in range(len(dataset.train))]
  # Sorted as bytes, capitals first, as torchvision does.
  assert train == [0] * 6 + [1] * 4 + [2] * 5
  assert [dataset.test[i]["label"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
  image = Image.open(photos / "val/bee/1.jpg").convert("RGB")
  width, height = image.size
  short = min(width, height)
  image = image.resize(
    (256 * width // short, 256 * height // short), Image.Resampling.BILINEAR
  )
  left, top = (round((side - 224) / 2) for side in image.size)
  np.testing.assert_array_equal(
    dataset.test[5]["image"],
    np.asarray(image)[top : top + 224, left : left + 224],
  )


def test_batches_resume_exactly(photos):
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  settings = {"batch_size": 4, "seed": 1}
  whole = list(data.train_batches(dataset, num_steps=9, **settings))
  again = data.get_dataset("image_folder", data_dir=str(photos))
  tail = list(data.train_batches(again, start_step=5, num_steps=4, **settings))
  for one, other in zip(whole[5:], tail, strict=True):
    for name, values in one.items():
      np.testing.assert_array_equal(values, other[name])


def test_what_is_no_image_is_not_read(photos):
  (photos / "train/ant/._0.JPEG").write_bytes(b"of a file manager")
  (photos / "train/ant/notes.txt").write_bytes(b"")
  (photos / "train/.cache").mkdir()
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  assert len(dataset.train) == 15


def test_a_part_of_imagenet_is_refused(imagenet, tmp_path):
  shutil.copytree(imagenet, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "train/n01440764")
  shutil.rmtree(tmp_path / "train/n01443537")
  (tmp_path / "train/tench").mkdir()
  message = refusal("imagenet2012", tmp_path)
  assert f"{tmp_path / 'train'} has 999 folders" in message
  assert "the 1000 classes n01440764 to n15075141" in message
  assert "2 missing (n01440764, ...)" in message
  assert "1 unknown (tench)" in message
  assert "--config.data.name=image_folder" in message


def test_more_classes_than_imagenet_has_are_refused(imagenet, tmp_path):
  shutil.copytree(imagenet, tmp_path, dirs_exist_ok=True)
  (tmp_path / "train/tench").mkdir()
  message = refusal("imagenet2012", tmp_path)
  assert "has 1001 folders" in message
  assert "n15075141: 1 unknown (tench)" in message


def test_test_images_without_folders_of_classes(tmp_path):
  tiny_imagenet.make_folders(tmp_path, flat=True)
  message = refusal("imagenet2012", tmp_path)
  assert f"{tmp_path / 'val'} has no folders of classes" in message
  assert "only files such as ILSVRC2012_val_" in message
  assert (
    f"python -m pqf_jax.data.prepare imagenet2012 --from {tmp_path} --to DIR"
    in message
  )


def test_a_test_class_that_is_not_trained(photos):
  (photos / "val/bee").rename(photos / "val/bees")
  message = refusal("image_folder", photos)
  assert f"{photos / 'val/bees'} is a class that" in message
  assert "(it has bee)" in message


def test_an_empty_class(photos):
  shutil.rmtree(photos / "train/bee")
  (photos / "train/bee").mkdir()
  assert f"{photos / 'train/bee'} holds no images" in refusal(
    "image_folder", photos
  )


def test_a_class_may_lack_test_images(photos):
  shutil.rmtree(photos / "val/ant")
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  assert [dataset.test[i]["label"] for i in range(4)] == [0, 0, 2, 2]


@pytest.mark.parametrize(
  ("removed", "kept"), [("val", "train"), ("train", "val")]
)
def test_a_missing_split(photos, removed, kept):
  shutil.rmtree(photos / removed)
  message = refusal("image_folder", photos)
  assert f"{photos} has a folder {kept}, but no folder {removed}" in message


@pytest.mark.parametrize("inner", ["train", "val"])
@pytest.mark.parametrize("name", ["image_folder", "imagenet2012"])
def test_an_inner_folder(photos, inner, name):
  message = refusal(name, photos / inner)
  assert f"data_dir={photos} has it: give that folder" in message


@pytest.mark.parametrize("folder", [None, "", "empty", "none"])
def test_nothing_there(tmp_path, folder):
  (tmp_path / "empty").mkdir()
  message = refusal("image_folder", folder and tmp_path / folder)
  assert "the folder that holds train/CLASS and val/CLASS" in message
  if folder == "none":
    assert f"in {tmp_path / 'none'} (it does not exist)" in message
