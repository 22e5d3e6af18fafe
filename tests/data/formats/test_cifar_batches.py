import pickle

import numpy as np
import pytest

from pqf_jax import data, errors
from pqf_jax.data.formats import cifar_batches
from tests.data import tiny_cifar

BATCHES = tiny_cifar.draw()
PYTHON = "cifar-10-batches-py", tiny_cifar.python_files(BATCHES)
BINARY = "cifar-10-batches-bin", tiny_cifar.binary_files(BATCHES)


@pytest.mark.parametrize("folder_and_files", [PYTHON, BINARY])
@pytest.mark.parametrize("packed", [True, False])
def test_images_and_labels_in_the_authors_order(
  tmp_path, folder_and_files, packed
):
  folder, files = folder_and_files
  if packed:
    kind = "python" if folder.endswith("py") else "binary"
    path = tmp_path / f"cifar-10-{kind}.tar.gz"
    tiny_cifar.write_archive(path, folder, files)
  else:
    tiny_cifar.write_folder(tmp_path / folder, files)
  dataset = data.get_dataset("cifar10", data_dir=str(tmp_path))
  *train, test = (BATCHES[name] for name in tiny_cifar.NAMES)
  for source, batches in ((dataset.train, train), (dataset.test, [test])):
    images = np.concatenate([images for images, _ in batches])
    labels = sum((labels for _, labels in batches), [])
    assert len(source) == len(images)
    for i, record in enumerate(source[i] for i in range(len(source))):
      np.testing.assert_array_equal(record["image"], images[i])
      assert record["label"] == labels[i]
  assert dataset.num_classes == 10


def test_python_2_could_have_written_the_pickles():
  """NumPy itself reads the same from them."""
  for name, content in PYTHON[1].items():
    images, labels = BATCHES[name]
    batch = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], tiny_cifar.rows(images))
    assert batch[b"labels"] == labels


def with_nested_labels():
  """Returns a batch whose label 7 is a list of 2**60 lists."""
  nested = b"]q\0" + 60 * b"](h\0h\0eq\0"
  batch = tiny_cifar.pickled(BATCHES["test_batch"][0], [1, 2, 3, 7])
  return batch.replace(b"J\7\0\0\0", nested, 1)


class Planted:
  def __reduce__(self):
    return print, ("code was run",)


@pytest.mark.parametrize(
  ("content", "why"),
  [
    (pickle.dumps(Planted(), 2), "an opcode BINUNICODE"),
    (pickle.dumps(Planted(), 0), "an opcode PUT"),
    (pickle.dumps({b"data": np.array([Planted()])}, 4), "an opcode FRAME"),
    (b"\x80\x02}.", "data"),
    # Python's unpickler makes room for 2**32 objects.
    (b"\x80\x02}r\xff\xff\xff\xff.", "data"),
    # It computes 2**60 hashes.
    (b"\x80\x02}N" + 60 * b"q\0h\0\x86" + b"Ns.", "keys that are no names"),
    # Of as many labels np.array would make an array.
    (with_nested_labels(), ""),
    (b"\x80\x02" + 2**18 * b"N" + b".", "more than 262144 opcodes"),
    (b"", ""),
    (PYTHON[1]["test_batch"][:-900], ""),
    (PYTHON[1]["test_batch"].replace(b"u1", b"i8"), "no rows of bytes"),
    (
      tiny_cifar.pickled(BATCHES["test_batch"][0], [1, 2, 3]),
      "not one label below 10 for each",
    ),
    (
      tiny_cifar.pickled(BATCHES["test_batch"][0], [1, 2, 3, 10]),
      "not one label below 10 for each",
    ),
    (
      tiny_cifar.pickled(BATCHES["test_batch"][0][:, :16], [1, 2, 3, 4]),
      r"of shape \(4, 1536\)",
    ),
  ],
)
def test_other_pickles_are_refused_and_run_nothing(
  tmp_path, capsys, content, why
):
  folder, files = PYTHON
  tiny_cifar.write_folder(tmp_path / folder, files | {"test_batch": content})
  with pytest.raises(
    errors.InputError, match=f"test_batch of .* is damaged: .*{why}"
  ):
    cifar_batches.Batches(tmp_path)
  assert "code was run" not in capsys.readouterr().out


def test_a_missing_batch_and_a_cut_archive_are_named(tmp_path):
  folder, files = BINARY
  few = {k: v for k, v in files.items() if k != "data_batch_3.bin"}
  path = tmp_path / "cifar-10-binary.tar.gz"
  tiny_cifar.write_archive(path, folder, few)
  with pytest.raises(errors.InputError, match="lacks data_batch_3.bin .*down"):
    cifar_batches.Batches(tmp_path)
  tiny_cifar.write_archive(path, folder, files)
  path.write_bytes(path.read_bytes()[:-5000])
  with pytest.raises(errors.InputError, match="is damaged .*download it again"):
    cifar_batches.Batches(tmp_path)
  path.write_bytes(b"no archive")
  with pytest.raises(errors.InputError, match="is damaged .*download it again"):
    cifar_batches.Batches(tmp_path)
  tiny_cifar.write_archive(
    path, folder, files | {"test_batch.bin": b"\0" * 3072}
  )
  with pytest.raises(errors.InputError, match="test_batch of .* is damaged"):
    cifar_batches.Batches(tmp_path)


def test_a_copy_of_tensorflow_datasets_comes_first_and_both_are_named(tmp_path):
  with pytest.raises(errors.InputError, match="cifar-10-python.tar.gz or"):
    data.get_dataset("cifar10", data_dir=str(tmp_path))
  tiny_cifar.write_folder(tmp_path / PYTHON[0], PYTHON[1])
  with pytest.raises(errors.InputError, match=f"data_dir={tmp_path} has it"):
    data.get_dataset("cifar10", data_dir=str(tmp_path / PYTHON[0]))
  version = tmp_path / "cifar10" / "3.0.2"
  version.mkdir(parents=True)
  (version / "dataset_info.json").write_text("{")
  with pytest.raises(errors.InputError, match="dataset_info.json"):
    data.get_dataset("cifar10", data_dir=str(tmp_path))


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@pytest.mark.parametrize("folder_and_files", [PYTHON, BINARY])
def test_a_changed_byte_gives_images_or_one_message(tmp_path, folder_and_files):
  folder, files = folder_and_files
  name = next(name for name in files if "test" in name)
  tiny_cifar.write_folder(tmp_path / folder, files)
  rng = np.random.default_rng(0)
  # All bytes but most of the pixels.
  start = files[name].find(tiny_cifar.rows(BATCHES["test_batch"][0])[:1, :9])
  places = [
    *range(max(start, 60)),
    *range(len(files[name]) - 40, len(files[name])),
  ]
  for place in places:
    content = bytearray(files[name])
    content[place] ^= int(rng.integers(1, 256))
    (tmp_path / folder / name).write_bytes(content)
    try:
      images = cifar_batches.Batches(tmp_path).split("test")
    except errors.InputError as error:
      assert "\n" not in str(error)
      continue
    assert all(0 <= images[i].label < 10 for i in range(len(images)))


def test_a_changed_byte_of_an_archive_is_found(tmp_path):
  path = tmp_path / "cifar-10-python.tar.gz"
  tiny_cifar.write_archive(path, *PYTHON)
  content = path.read_bytes()
  for place in range(100, len(content), 1999):  # after the file's name
    changed = bytearray(content)
    changed[place] ^= 1
    path.write_bytes(changed)
    with pytest.raises(errors.InputError, match="damaged|lacks"):
      cifar_batches.Batches(tmp_path)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
  path = tmp_path / "cifar-10-python.tar.gz"
  tiny_cifar.write_archive(path, PYTHON[0], PYTHON[1] | {"x": bytes(2**20)})
  cifar_batches.Batches(tmp_path)
  monkeypatch.setattr(cifar_batches, "MAX_UNPACKED", 2**20)
  with pytest.raises(errors.InputError, match="unpacks to more than 1048576"):
    cifar_batches.Batches(tmp_path)
