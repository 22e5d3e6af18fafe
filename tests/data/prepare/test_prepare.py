import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import tensorflow_datasets as tfds

from pqf_jax import data, errors
from pqf_jax.data import decoding
from pqf_jax.data.datasets import imagenet_labels
from pqf_jax.data.prepare import command, shards, tars
from tests.data import tiny_imagenet, tiny_tfds


@pytest.fixture(scope="module")
def sources(
  tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, pathlib.Path]:
  """All forms of ImageNet's sources; tests only read them."""
  top = tmp_path_factory.mktemp("sources")
  tiny_imagenet.make_archives(top / "archives")
  tiny_imagenet.make_folders(top / "folders")
  tiny_imagenet.make_folders(top / "flat", validation="validation", flat=True)
  return {folder.name: folder for folder in top.iterdir()}


def run(source: object, target: object) -> int:
  return command.main(
    ["imagenet2012", "--from", str(source), "--to", str(target)]
  )


def refusal(capsys, source: object, target: object) -> str:
  with pytest.raises(SystemExit) as caught:
    run(source, target)
  assert caught.value.code == 2
  return capsys.readouterr().err


@pytest.mark.parametrize("form", ["archives", "folders", "flat"])
def test_what_is_written_is_read_as_imagenet(sources, form, tmp_path):
  assert run(sources[form], tmp_path) == 0
  dataset = data.get_dataset("imagenet2012", data_dir=str(tmp_path))
  assert (len(dataset.train), len(dataset.test)) == (1000, 1000)
  assert dataset.num_classes == 1000
  for source, split in ((dataset.train, "train"), (dataset.test, "val")):
    labels = []
    for index in range(0, 1000, 111):
      record = source[index]
      labels.append(record["label"])
      expected = tiny_imagenet.color(record["label"], split)
      assert record["image"][0, 0].tolist() == [*expected]
    assert len(set(labels)) > 5
  names = (tmp_path / "imagenet2012/5.1.0/label.labels.txt").read_text().split()
  assert names == list(imagenet_labels.class_names())


def test_every_image_is_there_once_with_its_bytes(sources, tmp_path):
  run(sources["archives"], tmp_path)
  builder = tfds.builder_from_directory(tmp_path / "imagenet2012/5.1.0")
  for split in ("train", "validation"):
    source = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    actual = {
      example["file_name"].decode(): (example["label"], example["image"])
      for example in source
    }
    assert len(source) == 1000
    assert list(actual) == sorted(actual)
    assert actual == tiny_imagenet.files(split)
    assert builder.info.splits[split].num_bytes == sum(
      len(content) for _, content in actual.values()
    )


def test_the_features_are_those_of_tensorflow_datasets(sources, tmp_path):
  """The library's own builder of ImageNet describes them."""
  run(sources["archives"], tmp_path)
  ours = tfds.builder_from_directory(tmp_path / "imagenet2012/5.1.0").info
  theirs = tfds.builder("imagenet2012", data_dir=tmp_path / "none").info
  assert str(ours.version) == str(theirs.version)
  assert ours.features.to_json() == theirs.features.to_json()
  assert ours.features["label"].names == theirs.features["label"].names
  assert ours.supervised_keys == theirs.supervised_keys
  # Classes come one after the other, which matters to readers in order.
  assert ours.disable_shuffling


class Images(list):
  """Encoded images in memory."""

  def place(self, index: int) -> str:
    return f"image {index} of shelf"


def many(count: int = 23) -> shards.Split:
  images = Images(
    decoding.EncodedImage(
      tiny_tfds.encode(tiny_tfds.photo(3 * i), "jpeg"), i % 4
    )
    for i in range(count)
  )
  return shards.Split(
    images,
    [f"{i}.JPEG" for i in range(count)],
    [len(image.data) for image in images],
  )


def write(folder: pathlib.Path, split: shards.Split) -> pathlib.Path:
  return shards.write_dataset(
    folder,
    {"train": split, "validation": split},
    class_names=["a", "b", "c", "d"],
  )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [1, 5000, 10**9])
def test_any_number_of_files(tmp_path, monkeypatch, shard_bytes):
  monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
  split = many()
  folder = write(tmp_path, split)
  count = len(list(folder.glob("*-train.array_record-*")))
  least = sum(split.num_bytes) / shard_bytes
  assert count == 23 if shard_bytes == 1 else least <= count <= 2 * least + 1
  dataset = data.get_dataset("imagenet2012", data_dir=str(tmp_path))
  labels = [dataset.train[i]["label"] for i in range(23)]
  assert labels == [i % 4 for i in range(23)]


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
  split = many()

  class Stops(Images):
    reads = 0

    def __getitem__(self, index):
      self.reads += 1
      if self.reads == 15:
        raise KeyboardInterrupt
      return super().__getitem__(index)

  stopped = Stops(split.images)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "resumed", split._replace(images=stopped))
  with pytest.raises(errors.InputError, match="found no imagenet2012"):
    data.get_dataset("imagenet2012", data_dir=str(tmp_path / "resumed"))
  done = stopped.reads
  stopped.reads = 100
  folder = write(tmp_path / "resumed", split._replace(images=stopped))
  assert 46 - done < stopped.reads - 100 < 46
  assert contents(folder) == contents(write(tmp_path / "whole", split))
  assert os.listdir(folder.parent) == ["5.1.0"]


def test_another_source_does_not_go_on_with_the_files_of_one(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
  first = many(23)
  with pytest.raises(IndexError):
    write(tmp_path, first._replace(images=first.images[:20]))
  split = many(22)
  folder = write(tmp_path, split)
  assert contents(folder) == contents(write(tmp_path / "whole", split))


def test_an_empty_image_is_found_before(tmp_path):
  split = many(5)
  sizes = [*split.num_bytes[:3], 0, split.num_bytes[4]]
  with pytest.raises(errors.InputError, match="image 3 of shelf is empty"):
    write(tmp_path, split._replace(num_bytes=sizes))
  assert not list(tmp_path.rglob("*"))


def test_what_is_there_is_not_overwritten(tmp_path):
  folder = write(tmp_path, many(3))
  with pytest.raises(errors.InputError, match=f"{folder} exists already"):
    write(tmp_path, many(3))


def test_a_full_disk_is_found_before(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
  with pytest.raises(errors.InputError, match="no space is left"):
    write(tmp_path, many(3))
  assert not list(tmp_path.rglob("*.array_record*"))


@pytest.mark.parametrize("lacks", ["train", "val"])
def test_one_archive_is_missing(sources, tmp_path, capsys, lacks):
  shutil.copytree(sources["archives"], tmp_path / "tars")
  (tmp_path / f"tars/ILSVRC2012_img_{lacks}.tar").unlink()
  message = refusal(capsys, tmp_path / "tars", tmp_path / "to")
  assert f"{tmp_path / 'tars'} lacks ILSVRC2012_img_{lacks}.tar" in message


def test_nothing_is_there(tmp_path, capsys):
  message = refusal(capsys, tmp_path, tmp_path / "to")
  assert f"{tmp_path} has neither folders train and val nor ILSVRC" in message


@pytest.mark.parametrize("lacks", ["train", "val"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5003, 0.7])
def test_an_archive_that_is_cut_short(sources, tmp_path, capsys, lacks, kept):
  shutil.copytree(sources["archives"], tmp_path / "tars")
  path = tmp_path / f"tars/ILSVRC2012_img_{lacks}.tar"
  # Also at the start of a block, where only the end is missing.
  for size in (
    int(kept * path.stat().st_size),
    int(kept * path.stat().st_size) // 512 * 512,
  ):
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(capsys, tmp_path / "tars", tmp_path / "to")
    assert message.startswith(f"error: {path} ")
    assert "download it again" in message
  assert not (tmp_path / "to").exists()


def test_archives_that_were_packed_anew(sources, tmp_path, capsys):
  shutil.copytree(sources["archives"], tmp_path / "tars")
  path = tmp_path / "tars/ILSVRC2012_img_train.tar"
  flat = {
    name: content for name, (_, content) in tiny_imagenet.files("train").items()
  }
  path.write_bytes(tiny_imagenet.archive(flat))
  message = refusal(capsys, tmp_path / "tars", tmp_path / "to")
  assert "holds n01440764_7.JPEG, but must hold one CLASS.tar" in message
  path.write_bytes(
    tiny_imagenet.archive({"n01440764.tar": tiny_imagenet.archive(flat)})
  )
  message = refusal(capsys, tmp_path / "tars", tmp_path / "to")
  assert "holds 1 of 1000 classes" in message


@pytest.fixture(scope="module")
def classes() -> dict[str, bytes]:
  """The inner archives {CLASS.tar: content}, which must not be changed."""
  return {
    f"{name.split('_')[0]}.tar": tiny_imagenet.archive({name: content})
    for name, (_, content) in tiny_imagenet.files("train").items()
  }


def test_a_damaged_archive_of_a_class_is_named(
  sources, classes, tmp_path, capsys
):
  (tmp_path / "tars").mkdir()
  os.link(
    sources["archives"] / "ILSVRC2012_img_val.tar",
    tmp_path / "tars/ILSVRC2012_img_val.tar",
  )
  name = "n01443537.tar"
  images = {f"{i}.JPEG": bytes([i + 1]) * 600 for i in range(40)}
  whole = tiny_imagenet.archive(images)
  header = 5 * (512 + 1024)  # of the sixth image
  for content, message in (
    (bytes(10_240), "holds no files"),
    (bytes(20_480), "is damaged at byte 0 of 20480"),
    (
      whole[:header] + b"\1" + whole[header + 1 :],
      "is damaged at byte 7680 of",
    ),
    (whole[:header] + bytes(512) + whole[header + 512 :], "is damaged at byte"),
    (whole[:header] + bytes(len(whole) - header), "is damaged at byte 7680 of"),
    (whole[:header], "is cut short: it has 7680 bytes"),
    (whole[: header + 700], "is cut short|cannot be read"),
    (b"no archive" * 100, "is damaged at byte 0 of 1000"),
    (b"", "is cut short: it has 0 bytes"),
    (whole[: header + 1536] + whole[header:], "5.JPEG is there twice"),
  ):
    archives = tiny_imagenet.archive({**classes, name: content})
    (tmp_path / "tars/ILSVRC2012_img_train.tar").write_bytes(archives)
    shown = refusal(capsys, tmp_path / "tars", tmp_path / "to")
    assert re.search(rf"error: {name} in .*_train.tar:? ({message})", shown)
    assert "download" in shown
  # A whole archive within the others is taken.
  archives = tiny_imagenet.archive({**classes, name: whole})
  (tmp_path / "tars/ILSVRC2012_img_train.tar").write_bytes(archives)
  assert len(tars.train_images(tmp_path / "tars").images) == 999 + 40


def test_a_class_that_is_there_twice_is_named(classes, tmp_path):
  path = tmp_path / tars.TRAIN_TAR
  path.write_bytes(tiny_imagenet.archive(classes))
  again = tarfile.TarInfo("n01443537.tar")
  again.size = len(classes[again.name])
  with tarfile.open(path, "a") as archive:
    archive.addfile(again, io.BytesIO(classes[again.name]))
  with pytest.raises(errors.InputError, match="n01443537.tar is there twice"):
    tars.train_images(tmp_path)


def test_the_command_explains_itself():
  shown = subprocess.run(
    [sys.executable, "-m", "pqf_jax.data.prepare", "--help"],
    capture_output=True,
    text=True,
    timeout=120,
    cwd=pathlib.Path(__file__).parents[3],
  )
  assert shown.returncode == 0, shown.stderr
  assert "usage: python -m pqf_jax.data.prepare" in shown.stdout
  assert "ILSVRC2012_img_val.tar" in shown.stdout


def test_tensorflow_is_not_imported(sources, tmp_path):
  code = (
    "import sys; from pqf_jax import data; "
    "from pqf_jax.data.prepare import command; "
    f"to = {str(tmp_path)!r}; command.main(['imagenet2012', '--from', "
    f"{str(sources['archives'])!r}, '--to', to]); "
    "data.get_dataset('imagenet2012', data_dir=to).train[0]; "
    "assert 'tensorflow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
