"""Descriptions of prepared data sets, sound and damaged."""

import copy
import json
import os
import sys

import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import naming

from pqf_jax import errors
from pqf_jax.data.formats import tfds_info

INFO = {
  "name": "cifar10",
  "fileFormat": "array_record",
  "splits": [
    {"name": "train", "shardLengths": ["3", "4"], "numBytes": "70"},
    {"name": "test", "shardLengths": ["2"], "filepathTemplate": ""},
  ],
  "moduleName": "anything",
  "ofTheFuture": 1,
}
FEATURES = {
  "pythonClassName": "os.nothing",
  "featuresDict": {
    "features": {
      "image": {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}}},
      "label": {"classLabel": {"numClasses": "10"}},
    }
  },
}


def read(folder, info=INFO, features=FEATURES) -> tfds_info.Info:
  for name, content in (
    (tfds_info.INFO_FILE, info),
    (tfds_info.FEATURES_FILE, features),
  ):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
  return tfds_info.read(epath.Path(folder), "do this")


def refusal(folder, **content) -> str:
  with pytest.raises(errors.InputError) as caught:
    read(folder, **content)
  message = str(caught.value)
  assert "\n" not in message and "do this" in message
  return message


def changed(content: dict, path: tuple, value: object) -> dict:
  content = copy.deepcopy(content)
  part = content
  for name in path[:-1]:
    part = part[name]
  part[path[-1]] = value
  return content


@pytest.mark.parametrize(
  "template",
  ["", "{SPLIT}/data.{FILEFORMAT}-{SHARD_INDEX}-of-{NUM_SHARDS}"],
)
def test_names_are_those_of_tensorflow_datasets(tmp_path, template):
  info = read(
    tmp_path, changed(INFO, ("splits", 0, "filepathTemplate"), template)
  )
  assert info.num_classes == 10 and info.formats == ("array_record",)
  assert list(info.splits["train"].shard_lengths) == [3, 4]
  expected = naming.ShardedFileTemplate(
    tmp_path,
    template=template,
    dataset_name="cifar10",
    split="train",
    filetype_suffix="tfrecord",
  )
  assert [
    os.fspath(tmp_path / name) for name in info.file_names("train", "tfrecord")
  ] == list(map(os.fspath, expected.sharded_filepaths(2)))


def test_older_notations_are_read(tmp_path):
  label = {"type": "a.ClassLabel", "content": {"num_classes": 7}}
  dictionary = {"type": "a.FeaturesDict", "content": {"label": label}}
  assert read(tmp_path, features=dictionary).num_classes == 7
  message = FEATURES["featuresDict"]
  dictionary = {"type": "a.Dict", "proto_cls": "a.Dict", "content": message}
  assert read(tmp_path, features=dictionary).num_classes == 10
  info = {k: v for k, v in INFO.items() if k != "fileFormat"}
  assert read(tmp_path, info).formats == ("tfrecord",)


@pytest.mark.parametrize("file", ["info", "features"])
@pytest.mark.parametrize(
  "content",
  ["", "\0", "{", '{"name": "cif', "[]", "5", "[" * 99999, '{"a":' * 99999],
)
def test_a_file_that_is_no_json_object(tmp_path, file, content):
  name = {"info": "dataset_info.json", "features": "features.json"}[file]
  assert f"{name} is damaged" in refusal(tmp_path, **{file: content})


def test_a_missing_file(tmp_path):
  (tmp_path / tfds_info.INFO_FILE).write_text(json.dumps(INFO))
  with pytest.raises(errors.InputError, match="features.json is missing"):
    tfds_info.read(epath.Path(tmp_path), "do this")


SPLIT = ("splits", 0)
LABEL = ("featuresDict", "features", "label")


@pytest.mark.parametrize("value", [None, 5, "x", [5], {"a": 5}, [None], 1e99])
@pytest.mark.parametrize(
  "path", [("splits",), SPLIT, (*SPLIT, "shardLengths")], ids=str
)
def test_a_field_of_another_type(tmp_path, path, value):
  # No splits at all are missed when one is asked for.
  if (path, value) in [(("splits",), None), ((*SPLIT, "shardLengths"), [5])]:
    read(tmp_path, changed(INFO, path, value))
    return
  message = refusal(tmp_path, info=changed(INFO, path, value))
  assert "dataset_info.json is damaged" in message


@pytest.mark.parametrize(
  ("path", "value"),
  [
    (("name",), 5),
    (("fileFormat",), []),
    (("alternativeFileFormats",), "tfrecord"),
    ((*SPLIT, "shardLengths"), ["-1"]),
    ((*SPLIT, "shardLengths"), ["9" * 40]),
    ((*SPLIT, "shardLengths"), [1.5]),
    ((*SPLIT, "shardLengths"), [True]),
    ((*SPLIT, "shardLengths"), []),
    ((*SPLIT, "filepathTemplate"), "/dev/{SPLIT}"),
    ((*SPLIT, "filepathTemplate"), "a/../../{SPLIT}"),
    ((*SPLIT, "name"), "/../train"),
  ],
)
def test_a_field_with_an_impossible_value(tmp_path, path, value):
  message = refusal(tmp_path, info=changed(INFO, path, value))
  assert "dataset_info.json is damaged" in message


@pytest.mark.parametrize(
  "features",
  [
    {},
    {"type": "a", "content": 5},
    {"type": "a", "content": {"label": {"content": {"num_classes": "x"}}}},
    {"type": "a", "proto_cls": "b", "content": []},
    changed(FEATURES, LABEL, {"classLabel": {"numClasses": "0"}}),
    changed(FEATURES, LABEL, {"classLabel": {"numClasses": "-3"}}),
    changed(FEATURES, LABEL, {"classLabel": 10}),
    changed(FEATURES, LABEL, 10),
  ],
)
def test_features_without_classes(tmp_path, features):
  message = refusal(tmp_path, features=features)
  assert "features.json is damaged" in message


def test_no_module_that_a_description_names_is_imported(tmp_path, monkeypatch):
  (tmp_path / "planted.py").write_text("raise SystemExit('code was run')")
  monkeypatch.syspath_prepend(tmp_path)
  features = FEATURES | {"pythonClassName": "planted.Features"}
  read(tmp_path, INFO | {"moduleName": "planted"}, features)
  old = {"type": "planted.Features", "content": {}}
  assert "features.json is damaged" in refusal(tmp_path, features=old)
  assert "planted" not in sys.modules


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=5,
)
PLACES = [
  ("info", path)
  for path in [("name",), ("fileFormat",), ("splits",), SPLIT, ("version",)]
  + [(*SPLIT, name) for name in ("name", "shardLengths", "filepathTemplate")]
] + [("features", LABEL[:n]) for n in (1, 2, 3)]


@settings(
  max_examples=40,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.sampled_from(PLACES), value=ANYTHING)
def test_whatever_a_field_holds_is_read_or_refused(tmp_path, place, value):
  file, path = place
  content = {"info": INFO, "features": FEATURES}[file]
  try:
    info = read(tmp_path, **{file: changed(content, path, value)})
  except errors.InputError as error:
    assert "is damaged" in str(error)
  else:
    assert info.num_classes > 0
    assert all(info.file_names(name, "tfrecord") for name in info.splits)
