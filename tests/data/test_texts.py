"""Sequences of bytes out of running text."""

import numpy as np
import pytest

from pqf_jax import data, errors
from pqf_jax.data import texts


def test_test_sequences_tile_the_text(tmp_path):
  text = bytes(range(200))
  (tmp_path / "train.txt").write_bytes(text)
  (tmp_path / "test.txt").write_bytes(text)
  given = texts.load("text", str(tmp_path), length=8)
  rows = [given.test_row(i)["tokens"] for i in range(len(given.test))]
  # Each byte but the first is predicted once; seven are left over.
  predicted = np.concatenate([row[1:] for row in rows])
  np.testing.assert_array_equal(predicted, np.arange(1, 193))
  assert all((row[1:] == row[:-1] + 1).all() for row in rows)


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_training_sequences_begin_anywhere_in_their_stretch(tmp_path, draw):
  for split in ("train.txt", "test.txt"):
    (tmp_path / split).write_bytes(bytes(range(100)))
  given = texts.load("text", str(tmp_path), length=8)
  starts = [
    given.train_row(i, np.array([draw]))["tokens"]
    for i in range(len(given.train))
  ]
  assert all(len(row) == 9 for row in starts)
  shift = int(8 * draw)
  wanted = np.minimum(8 * np.arange(12) + shift, 91)
  np.testing.assert_array_equal([row[0] for row in starts], wanted)


def test_the_reference_of_python_is_there():
  given = texts.load("pydoc", "", length=128)
  assert len(given.train) > 8 * len(given.test) > 1000
  (batch,) = data.train_batches(given, batch_size=4, seed=0, num_steps=1)
  assert batch["tokens"].shape == (4, 129)
  assert batch["tokens"].dtype == np.int32


def test_what_is_no_text_is_refused(tmp_path):
  for split in ("train.txt", "test.txt"):
    (tmp_path / split).write_bytes(b"too short")
  for arguments, message in (
    (("novel", ""), "config.data.name is 'novel'"),
    (("text", str(tmp_path / "no")), "train.txt cannot be read"),
    (("text", str(tmp_path)), "has 9 bytes; give 17 or more"),
  ):
    with pytest.raises(errors.InputError, match=message):
      texts.load(*arguments, length=8)
