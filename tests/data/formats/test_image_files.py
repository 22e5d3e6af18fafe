import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from pqf_jax import data, errors
from pqf_jax.data.formats import image_files
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
  dataset = data.get_dataset(
    "image_folder", data_dir=str(photos), image_size=28
  )
  assert dataset.num_classes == 3
  train = [dataset.train[i]["label"] for i in range(len(dataset.train))]
  # Sorted as bytes, capitals first, as torchvision does.
  assert train == [0] * 6 + [1] * 4 + [2] * 5
  assert [dataset.test[i]["label"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
  image = Image.open(photos / "val/bee/1.jpg").convert("RGB")
  width, height = image.size
  short = min(width, height)
  image = image.resize(
    (32 * width // short, 32 * height // short), Image.Resampling.BILINEAR
  )
  left, top = (round((side - 28) / 2) for side in image.size)
  np.testing.assert_array_equal(
    dataset.test[5]["image"],
    np.asarray(image)[top : top + 28, left : left + 28],
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


def test_what_is_no_image_is_counted_and_named(photos):
  (photos / "train/ant/._0.JPEG").write_bytes(b"of a file manager")
  (photos / "train/ant/below").mkdir()
  for name in ("notes.txt", "1.gif", "2.jfif", "below/3.gif", "none"):
    (photos / "train/ant" / name).write_bytes(b"")
  (photos / "train/.cache").mkdir()
  (photos / "train/beside.png").write_bytes(b"")
  with pytest.warns(UserWarning, match="train: 8 entries are") as caught:
    dataset = data.get_dataset("image_folder", data_dir=str(photos))
  # Others may be of files that an earlier test left to the garbage collector.
  (message,) = (
    str(warning.message)
    for warning in caught
    if warning.category is UserWarning
  )
  for text in (
    ".gif: 2",
    "no suffix: 2",
    ".jfif: 1",
    ".cache, beside.png, ant",
  ):
    assert text in message
  assert len(dataset.train) == 15


def test_what_is_no_regular_file_is_skipped(photos):
  os.mkfifo(photos / "val/ant/pipe.png")
  (photos / "val/ant/lost.png").symlink_to("nowhere")
  (photos / "val/ant/itself.png").symlink_to("itself.png")
  (photos / "val/ant/above").symlink_to("..")
  with pytest.warns(
    UserWarning,
    match="val: 4 .*ant/above, ant/itself.png, ant/lost.png, ant/pipe.png",
  ):
    dataset = data.get_dataset("image_folder", data_dir=str(photos))
  assert len(dataset.test) == 6


def test_links_in_a_circle_are_followed_once(photos):
  # Each of 2^40 ways through them ends where the system follows no more.
  for number in range(2):
    (photos / f"val/ant/{number}").symlink_to(photos / "val/bee")
    (photos / f"val/bee/{number}").symlink_to(photos / "val/ant")
  with pytest.warns(UserWarning, match="val: 6 .*ant/0/0, ant/0/1, ant/1"):
    split = image_files.Folder(photos).split("validation")
  assert split.labels == [0] * 2 + [1] * 4 + [2] * 4
  assert sum("/ant/0/" in path for path in split.paths) == 2


def test_images_below_the_folder_of_their_class(photos):
  """Finds the files that torchvision's walk finds, in its order."""
  (photos / "val/bee/1.jpg").rename(photos / "val/bee/z.jpg")
  elsewhere = photos / "elsewhere"
  for name in ("a/1.PNG", "a-b/2.webp", "a/b/3.pgm", "a/0.jpeg"):
    path = photos / "val/bee" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 9), 30).save(path)
  (photos / "val/bee/a-b").rename(elsewhere)
  (photos / "val/bee/a-b").symlink_to(elsewhere)
  split = image_files.Folder(photos).split("validation")
  expected = [
    os.path.join(root, name)
    for root, _, names in sorted(os.walk(photos / "val/bee", followlinks=True))
    for name in sorted(names)
  ]
  assert [os.path.basename(path) for path in expected] == [
    *("0.JPEG", "z.jpg", "0.jpeg", "1.PNG", "2.webp", "3.pgm")
  ]
  assert split.paths[4:] == expected
  assert split.labels == [0] * 2 + [1] * 2 + [2] * 6


def test_images_turned_and_with_16_bits(photos):
  """Reads the pixels of a picture however it is stored."""
  picture = np.random.default_rng(0).integers(0, 256, (224, 224), np.uint8)
  turned = Image.Exif()
  turned[0x0112] = 6
  for path in (photos / "val/bee").iterdir():
    path.unlink()
  for name, pixels, settings in (
    ("8", picture, {}),
    ("16", picture.astype(np.uint16) * 257, {}),
    ("turned", np.rot90(picture), {"exif": turned}),
  ):
    path = photos / "val/bee" / f"{name}.png"
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **settings)
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  images = [
    record["image"]
    for index in range(7)
    if (record := dataset.test[index])["label"] == 2
  ]
  assert len(images) == 3
  for image in images[1:]:
    np.testing.assert_array_equal(image, images[0])


def test_a_refused_test_image_is_named_with_the_fix(photos):
  pixels = np.random.default_rng(0).random((9, 9), np.float32)
  Image.fromarray(pixels).save(photos / "val/Cat/0.tiff")
  dataset = data.get_dataset("image_folder", data_dir=str(photos))
  with pytest.raises(errors.InputError, match="Cat/0.tiff .*mode F in TIFF"):
    [dataset.test[index] for index in range(7)]


def test_both_folders_of_test_images_are_refused(photos):
  shutil.copytree(photos / "val", photos / "validation")
  assert "both folders val and validation" in refusal("image_folder", photos)


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class(photos, split):
  shutil.rmtree(photos / split / "bee")
  (photos / split / "bee").mkdir()
  assert f"{photos / split / 'bee'} holds no images" in refusal(
    "image_folder", photos
  )


def test_a_class_without_test_images(photos):
  shutil.rmtree(photos / "val/ant")
  message = refusal("image_folder", photos)
  assert "val has no images of 1 of the 3 classes: ant" in message
  assert f"remove these classes from {photos / 'train'}" in message


def test_one_class_is_none(photos):
  for name in ("ant", "bee"):
    for split in ("train", "val"):
      shutil.rmtree(photos / split / name)
  message = refusal("image_folder", photos)
  assert "has one folder of a class, Cat; a classifier needs two" in message


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
