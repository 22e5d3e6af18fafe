"""What could be read for ever is not read."""

import json
import os

import ml_collections
import pytest
from etils import epath

from pqf_jax import errors
from pqf_jax.data.coco import annotations
from pqf_jax.data.formats import tfds_folder, tfds_info
from pqf_jax.pipeline import workspace
from pqf_jax.report import records
from pqf_jax.runtime import files


def read_records(path):
  split = {"name": "train", "shardLengths": ["1"], "filepathTemplate": "x"}
  info = {"name": "a", "splits": [split]}
  label = {"label": {"classLabel": {"numClasses": "2"}}}
  features = {"featuresDict": {"features": label}}
  (path.parent / tfds_info.INFO_FILE).write_text(json.dumps(info))
  (path.parent / tfds_info.FEATURES_FILE).write_text(json.dumps(features))
  tfds_folder.Folder(path.parent, "do this").split("train")


CONFIG = ml_collections.ConfigDict({"tensorboard": False})


def read_results(path):
  path.rename(path.parent / "model.safetensors")
  with workspace.Workspace(os.fspath(path.parent), CONFIG) as files_of_run:
    files_of_run.write_results({"top1": 0.5})


@pytest.mark.parametrize(
  "read",
  [
    files.read_json,
    files.fetch,
    annotations.read,
    read_records,
    read_results,
    records.read_metrics,
    lambda path: records.append_metric(path, {"stage": "a", "step": 1}),
    files.lock,
    lambda path: files.digest_tree(path.parent),
  ],
)
def test_a_device_is_refused(tmp_path, read):
  # Reading it ends at once, where a pipe would be waited for.
  path = epath.Path(tmp_path / "x")
  os.symlink(os.devnull, path)
  with pytest.raises(
    errors.InputError, match="(x|model.safetensors) is not a regular file"
  ):
    read(path)


def test_a_workdir_that_is_a_file_is_named(tmp_path):
  (tmp_path / "x").touch()
  with pytest.raises(errors.InputError, match="x is a file; give a folder"):
    workspace.Workspace(os.fspath(tmp_path / "x"), CONFIG)
