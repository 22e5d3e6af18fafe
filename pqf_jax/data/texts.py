"""Running text as sequences of bytes."""

import pathlib
import pydoc_data.topics
from typing import NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.data import batching, sentences

PYDOC = "pydoc"
# Of Python's reference, whose end is for the evaluation.
TEST_SHARE = 10


class Stretches(NamedTuple):
  """A text in stretches of equal length; the rest at its end is left out.

  Attributes:
    tokens: int32 [bytes].
    length: T, tokens of a stretch.
  """

  tokens: np.ndarray
  length: int

  def __len__(self) -> int:
    return (len(self.tokens) - 1) // self.length

  def row(self, index: int, shift: int = 0) -> batching.Row:
    """Returns `tokens` int32 [T + 1] from so many behind a stretch's start."""
    most = len(self.tokens) - self.length - 1
    start = min(index * self.length + shift, most)
    return {"tokens": self.tokens[start : start + self.length + 1]}


class Texts(NamedTuple):
  """Text in two splits, a `batching.Dataset`.

  Attributes:
    name: of the data set.
    train: training text; a row begins anywhere in its stretch.
    test: test text.
  """

  name: str
  train: Stretches
  test: Stretches

  @property
  def num_draws(self) -> int:
    """Returns 1, for where a row begins."""
    return 1

  def train_row(self, index: int, draws: np.ndarray) -> batching.Row:
    """Returns `tokens` int32 [T + 1]: the inputs, and what follows the last."""
    return self.train.row(index, int(draws[0] * self.train.length))

  def test_row(self, index: int) -> batching.Row:
    """Returns `tokens` int32 [T + 1]."""
    return self.test.row(index)


def load(name: str, folder: str, *, length: int) -> Texts:
  """Opens a text of bytes.

  Args:
    name: 'pydoc', the language reference that comes with Python, or 'text'.
    folder: of 'text': holds train.txt and test.txt.
    length: bytes of a sequence, without the last, which is only predicted.

  Raises:
    InputError: no such text, a folder for 'pydoc', a missing file, or a split
      without two sequences.
  """
  if name == PYDOC:
    if folder:
      raise errors.InputError(
        f"config.data.dir is {folder!r}, but config.data.name 'pydoc', which "
        "comes with Python; give --config.data.name=text for the text there"
      )
    whole = "\n".join(pydoc_data.topics.topics.values()).encode()
    end = len(whole) - len(whole) // TEST_SHARE
    parts = [whole[:end], whole[end:]]
  elif name == "text":
    parts = [_read(folder, split) for split in sentences.SPLITS]
  else:
    raise errors.InputError(
      f"config.data.name is {name!r}; of text there are 'pydoc', and 'text' in "
      "config.data.dir"
    )
  train, test = (
    Stretches(np.frombuffer(part, np.uint8).astype(np.int32), length)
    for part in parts
  )
  for split, stretches in (("training", train), ("test", test)):
    if len(stretches) < 2:
      raise errors.InputError(
        f"the {split} text of {name!r} has {len(stretches.tokens)} bytes; give "
        f"{2 * length + 1} or more, or a smaller config.data.length"
      )
  return Texts(name, train, test)


def _read(folder: str, split: str) -> bytes:
  path = pathlib.Path(folder).expanduser() / split
  try:
    return path.read_bytes()
  except OSError as error:
    raise errors.InputError(
      f"{path} cannot be read ({error.strerror}); give a folder with "
      f"{' and '.join(sentences.SPLITS)}, --config.data.dir=DIR"
    ) from error
