import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pqf_jax import data, errors
from tests.data import tiny_tfds

# The command in the message of a missing data set.
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
    actual = all_records(source)
    assert len(source) == count
    assert sorted(record["label"] for record in actual) == list(range(count))
    for record in actual:
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
  actual = all_records(dataset.test)
  assert sorted(r["label"] for r in actual) == list(range(tiny_tfds.NUM_TEST))
  for record in actual:
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
  assert f"in {tmp_path / 'none'} (it does not exist)" in message
  assert PREPARE.format(tmp_path / "none") in message


def test_a_folder_without_the_data_set(tmp_path):
  message = refusal("imagenet2012", tmp_path)
  assert "found no imagenet2012/VERSION/dataset_info.json" in message
  assert f"in {tmp_path};" in message
  assert "ILSVRC2012_img_val.tar" in message
  assert (
    f"python -m pqf_jax.data.prepare imagenet2012 --from TARS --to {tmp_path}"
    in message
  )


@pytest.mark.parametrize("inner", ["cifar10", "cifar10/3.0.2"])
@pytest.mark.parametrize("relative", [False, True])
def test_an_inner_folder(prepared, monkeypatch, inner, relative):
  monkeypatch.chdir(prepared / inner)
  message = refusal("cifar10", "." if relative else prepared / inner)
  assert f"data_dir={prepared} has it: give that folder" in message


def test_a_preparation_that_was_interrupted_at_its_end(spoiled):
  folder = spoiled / "cifar10/3.0.2"
  folder.rename(folder.with_name("incomplete.A3_3.0.2"))
  assert "found no cifar10/VERSION" in refusal("cifar10", spoiled)


def test_a_preparation_that_was_interrupted(spoiled):
  (spoiled / "cifar10/3.0.2/dataset_info.json").unlink()
  message = refusal("cifar10", spoiled)
  assert "found no cifar10/VERSION/dataset_info.json or cifar-10" in message
  assert f" in {spoiled};" in message
  assert PREPARE.format(spoiled) in message


def test_a_tfrecord_copy_is_read_to_the_same_images(prepared, spoiled):
  for name in ("cifar10", "imagenet2012"):
    tiny_tfds.to_tfrecord(spoiled / name / "3.0.2")
    expected = data.get_dataset(name, data_dir=str(prepared))
    actual = data.get_dataset(name, data_dir=str(spoiled))
    assert actual.num_classes == expected.num_classes
    for split in ("train", "test"):
      records = all_records(getattr(actual, split))
      originals = all_records(getattr(expected, split))
      for one, other in zip(records, originals, strict=True):
        assert one["label"] == other["label"]
        np.testing.assert_array_equal(one["image"], other["image"])


def test_batches_from_tfrecord_files_resume_exactly(prepared, spoiled):
  tiny_tfds.to_tfrecord(spoiled / "imagenet2012/3.0.2")
  settings = {"batch_size": 6, "seed": 5, "num_steps": 7}
  whole, tail = (
    list(
      data.train_batches(
        data.get_dataset("imagenet2012", data_dir=str(folder)),
        start_step=start,
        **settings,
      )
    )
    for folder, start in ((prepared, 0), (spoiled, 3))
  )
  for one, other in zip(whole[3:], tail[:4], strict=True):
    for name, values in one.items():
      np.testing.assert_array_equal(values, other[name])


def test_another_format(spoiled):
  folder = spoiled / "cifar10/3.0.2"
  edit(folder / "dataset_info.json", '"array_record"', '"riegeli"')
  message = refusal("cifar10", spoiled)
  assert f"{folder} is in the format riegeli" in message
  # The same data_dir would be refused: the data set is there already.
  assert PREPARE.format(f"{spoiled}_array_record") in message


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_a_byte_that_has_changed_costs_at_most_one_image(spoiled, name, form):
  folder = spoiled / name / "3.0.2"
  if form == "tfrecord":
    tiny_tfds.to_tfrecord(folder, num_shards=1)
  (file,) = folder.glob(f"*-train.{form}-*")
  whole = all_records(data.get_dataset(name, data_dir=str(spoiled)).train)
  content = bytearray(file.read_bytes())
  # Signature of the image in a record in the middle.
  signature = b"PNG" if name == "cifar10" else b"\xff\xd8\xff"
  places = [i for i in range(len(content)) if content.startswith(signature, i)]
  content[places[9]] ^= 64
  file.write_bytes(content)
  train = data.get_dataset(name, data_dir=str(spoiled)).train
  actual = all_records(train)
  assert [r["label"] for r in actual[:9] + actual[10:]] == [
    r["label"] for r in whole[:9] + whole[10:]
  ]
  assert actual[9]["label"] == whole[10]["label"]


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_a_byte_that_has_changed_in_a_test_image_is_an_error(spoiled, name):
  split = {"cifar10": "test", "imagenet2012": "validation"}[name]
  (file,) = (spoiled / name).glob(f"*/*-{split}.array_record-*")
  content = bytearray(file.read_bytes())
  signature = b"PNG" if name == "cifar10" else b"\xff\xd8\xff"
  content[content.index(signature)] ^= 64
  file.write_bytes(content)
  with pytest.raises(errors.InputError, match=f"record 0 of {file} cannot be"):
    all_records(data.get_dataset(name, data_dir=str(spoiled)).test)


def test_a_record_that_is_no_example(spoiled):
  folder = spoiled / "imagenet2012/3.0.2"
  tiny_tfds.to_tfrecord(folder, num_shards=1)
  (file,) = folder.glob("*-validation.tfrecord-*")
  file.write_bytes(tiny_tfds.framed(b"\xff\xff") + tiny_tfds.framed(b"") * 6)
  test = data.get_dataset("imagenet2012", data_dir=str(spoiled)).test
  for index in (0, 3):
    with pytest.raises(
      errors.InputError,
      match=rf"record {index} of {file} .*not an example with image and label",
    ):
      test[index]


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.999])
@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_a_file_that_is_cut_short(spoiled, name, kept):
  (file,) = (spoiled / name).glob("*/*-train.array_record-*")
  size = int(kept * file.stat().st_size)
  file.write_bytes(file.read_bytes()[:size])
  message = refusal(name, spoiled)
  assert f"{file} has {size} bytes and can be read as 0 records" in message
  assert f"says {tiny_tfds.NUM_TRAIN}" in message


def test_a_damaged_image_is_named_by_file_and_number(spoiled):
  (file,) = (spoiled / "imagenet2012").glob("*/*-train.array_record-*")
  images = [tiny_tfds.encode(tiny_tfds.photo(i), "jpeg") for i in range(20)]
  images[4] = images[4][: len(images[4]) // 2]
  shutil.rmtree(spoiled / "imagenet2012")
  with tfds.core.registered.skip_registration():
    splits = {"train": images, "validation": images}
    tiny_tfds.write(spoiled, "imagenet2012", "jpeg", splits)
  dataset = data.get_dataset("imagenet2012", data_dir=str(spoiled))
  with pytest.warns(UserWarning, match=rf"record (\d+) of {file} cannot"):
    train = all_records(dataset.train)
  assert 4 not in [record["label"] for record in train]
  assert len(train) == 20
  with pytest.raises(
    errors.InputError, match=r"record \d+ of .*-validation.array_record-00000"
  ):
    list(data.eval_batches(dataset, batch_size=5))


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
      errors.InputError, match="record .* label 19, but .* classes 0 to 18"
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
