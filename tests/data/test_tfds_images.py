"""Any prepared data set of image classification."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pqf_jax import data, errors
from tests.data import tiny_tfds

NUM_TRAIN = 12


def write(folder, name, **splits):
  with tfds.core.registered.skip_registration():
    tiny_tfds.write(
      folder,
      name,
      "png",
      {
        split: [
          tiny_tfds.encode(Image.fromarray(tiny_tfds.flat_image(i)), "png")
          for i in range(count)
        ]
        for split, count in splits.items()
      },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  top = tmp_path_factory.mktemp("tfds")
  write(top, "whole", train=NUM_TRAIN, validation=3, test=5)
  write(top, "part", train=NUM_TRAIN, validation=3)
  write(top, "alone", train=NUM_TRAIN)
  return top


def labels(source):
  return sorted(source[i]["label"] for i in range(len(source)))


def refusal(name, folder):
  with pytest.raises(errors.InputError) as caught:
    data.get_dataset(f"tfds:{name}", data_dir=str(folder))
  return str(caught.value)


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
@pytest.mark.parametrize(("name", "count"), [("whole", 5), ("part", 3)])
def test_images_and_labels_of_any_name(folder, tmp_path, form, name, count):
  if form == "tfrecord":
    write(tmp_path, name, train=NUM_TRAIN, **{"validation": 3, "test": count})
    folder = tmp_path
    tiny_tfds.to_tfrecord(folder / name / "3.0.2")
  dataset = data.get_dataset(f"tfds:{name}", data_dir=str(folder))
  assert dataset.num_classes == NUM_TRAIN
  assert labels(dataset.train) == list(range(NUM_TRAIN))
  assert labels(dataset.test) == list(range(count))
  for i in range(count):  # small images stay as they are
    record = dataset.test[i]
    np.testing.assert_array_equal(
      record["image"], tiny_tfds.flat_image(record["label"])
    )


def test_a_fifth_is_held_out_where_there_are_no_test_images(folder):
  with pytest.warns(UserWarning, match="every 5th of its 12 training images"):
    dataset = data.get_dataset("tfds:alone", data_dir=str(folder))
  assert (len(dataset.train), len(dataset.test)) == (10, 2)
  assert sorted(labels(dataset.train) + labels(dataset.test)) == list(
    range(NUM_TRAIN)
  )


def test_a_folder_of_a_configuration_is_part_of_the_name(folder, tmp_path):
  (tmp_path / "sets").mkdir()
  (folder / "whole").rename(tmp_path / "sets" / "small-v2")
  try:
    dataset = data.get_dataset("tfds:sets/small-v2", data_dir=str(tmp_path))
    assert len(dataset.test) == 5
  finally:
    (tmp_path / "sets" / "small-v2").rename(folder / "whole")


@pytest.mark.parametrize("name", ["", "../whole", "a b", "{x}", "whole/.."])
def test_what_is_no_name(folder, name):
  assert "give tfds:NAME or tfds:NAME/CONFIG" in refusal(name, folder)


def test_what_is_not_prepared_and_what_has_no_labels(folder, tmp_path):
  message = refusal("nosuch", folder)
  assert "found no nosuch/VERSION/dataset_info.json" in message
  assert "tfds.builder('nosuch', data_dir=" in message
  write(tmp_path, "whole", train=2)
  features = tmp_path / "whole/3.0.2/features.json"
  features.write_text('{"featuresDict": {"features": {"text": {}}}}')
  assert "no feature 'label' with classes" in refusal("whole", tmp_path)


def test_examples_without_an_image(tmp_path):
  class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    name = "numbers"

    def _info(self):
      features = {
        "value": tfds.features.Scalar(np.int64),
        "label": tfds.features.ClassLabel(num_classes=2),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {"train": iter([(i, {"value": i, "label": i}) for i in range(2)])}

    def _generate_examples(self):
      """Not used: the split has its examples."""

  builder = Builder(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  assert "must be a data set of image classification" in refusal(
    "numbers", tmp_path
  )
