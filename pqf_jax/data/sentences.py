"""Sentences, one a line of a text file, as tokens of BERT's vocabulary."""

import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.data import batching

PADDING, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
VOCABULARY = "vocab.txt"
SPLITS = ("train.txt", "test.txt")
# Of a word in characters; longer ones are unknown.
_LONGEST_WORD = 100
# Chinese, Japanese and Korean ideographs, each of which is a word.
_IDEOGRAPHS = (
  (0x4E00, 0x9FFF),
  (0x3400, 0x4DBF),
  (0x20000, 0x2A6DF),
  (0x2A700, 0x2B73F),
  (0x2B740, 0x2B81F),
  (0x2B820, 0x2CEAF),
  (0xF900, 0xFAFF),
  (0x2F800, 0x2FA1F),
)


class Vocabulary:
  """The tokens of an uncased BERT (WordPiece, arXiv 1609.08144)."""

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Reads a `vocab.txt`: one token a line, its number that of the line.

    Raises:
      InputError: no such file, or one without the four tokens of all sentences.
    """
    wanted = "the network's vocab.txt, --config.data.vocabulary=FILE"
    lines = _read_lines(path, wanted)
    self._numbers = {line: number for number, line in enumerate(lines)}
    self._size = len(lines)  # a token may be there twice
    lacking = {PADDING, UNKNOWN, FIRST, LAST} - self._numbers.keys()
    if lacking or self._numbers[PADDING]:
      raise errors.InputError(
        f"{path} is no vocabulary of BERT: its first line is "
        f"{lines[0] if lines else ''!r} and it lacks "
        f"{', '.join(sorted(lacking)) or 'nothing'}; give the vocab.txt of the "
        f"network, whose first line is {PADDING}"
      )

  def __len__(self) -> int:
    return self._size

  def tokenize(self, sentence: str, longest: int | None = None) -> list[int]:
    """Returns the numbers of a sentence's tokens, both ends included.

    Args:
      sentence: any text; case and accents are dropped.
      longest: so many tokens at most, of which the last is the end; None: all.
    """
    inner = [
      self._numbers[piece]
      for word in split_words(sentence)
      for piece in self._pieces(word)
    ]
    if longest is not None:
      inner = inner[: longest - 2]
    return [self._numbers[FIRST], *inner, self._numbers[LAST]]

  def _pieces(self, word: str) -> list[str]:
    """Cuts a word into the longest known pieces, from its start."""
    pieces: list[str] = []
    start = 0
    while start < len(word):
      prefix = "##" if start else ""
      ends = range(len(word), start, -1)
      end = next(
        (e for e in ends if prefix + word[start:e] in self._numbers), None
      )
      if end is None or len(word) > _LONGEST_WORD:
        return [UNKNOWN]
      pieces.append(prefix + word[start:end])
      start = end
    return pieces


def split_words(text: str) -> list[str]:
  """Splits a text as BERT does: at white space, punctuation and ideographs."""
  plain = unicodedata.normalize("NFD", text.lower())
  return "".join(map(_spaced, plain)).split()


def _spaced(char: str) -> str:
  """Returns what a character is in a text whose words are apart."""
  category = unicodedata.category(char)
  if char in "\t\n\r" or category == "Zs":
    return " "
  if char == "\ufffd" or category in ("Mn", "Cc", "Cf", "Co", "Cs"):
    return ""
  # Symbols of ASCII, such as $ and +, count as punctuation too.
  is_mark = category[0] == "P" or (char.isascii() and not char.isalnum())
  code = ord(char)
  if is_mark or any(low <= code <= high for low, high in _IDEOGRAPHS):
    return f" {char} "
  return char


class Sentences(NamedTuple):
  """Sentences in two splits, a `batching.Dataset`.

  Attributes:
    name: of the folder.
    train: tokens of each training sentence.
    test: tokens of each test sentence.
    length: tokens of a row, T: shorter sentences are padded with 0.
  """

  name: str
  train: Sequence[Sequence[int]]
  test: Sequence[Sequence[int]]
  length: int

  @property
  def num_draws(self) -> int:
    """Returns 0: sentences are not augmented."""
    return 0

  def train_row(self, index: int, draws: np.ndarray) -> batching.Row:
    """Returns `tokens` int32 [T]."""
    del draws
    return self._row(self.train[index])

  def test_row(self, index: int) -> batching.Row:
    """Returns `tokens` int32 [T]."""
    return self._row(self.test[index])

  def _row(self, tokens: Sequence[int]) -> batching.Row:
    row = np.zeros(self.length, np.int32)
    row[: len(tokens)] = tokens
    return {"tokens": row}


def load(folder: str, vocabulary: Vocabulary, *, longest: int) -> Sentences:
  """Reads a folder with `train.txt` and `test.txt`, a sentence a line.

  Args:
    folder: holds both files, in UTF-8; empty lines are left out.
    vocabulary: of the network.
    longest: tokens of a sentence at most; longer ones are cut.

  Raises:
    InputError: no folder is given, or a file is missing, holds other text or
      fewer than two sentences.
  """
  if not folder:
    raise errors.InputError(
      "sentences need config.data.dir, a folder with "
      f"{' and '.join(SPLITS)}, one sentence a line; give --config.data.dir=DIR"
    )
  path = pathlib.Path(folder).expanduser()
  train, test = (
    [vocabulary.tokenize(line, longest) for line in _sentences(path / split)]
    for split in SPLITS
  )
  length = max(map(len, (*train, *test)))
  return Sentences(path.name, train, test, length)


def _sentences(path: pathlib.Path) -> list[str]:
  wanted = f"{' and '.join(SPLITS)} in config.data.dir, one sentence a line"
  lines = [line for line in _read_lines(path, wanted) if line.strip()]
  if len(lines) < 2:
    raise errors.InputError(
      f"{path} has {len(lines)} sentences; give two or more, one a line"
    )
  return lines


def _read_lines(path: str | os.PathLike[str], wanted: str) -> list[str]:
  """Reads the lines of a text file, which `wanted` describes."""
  try:
    text = pathlib.Path(path).read_text("utf-8")
  except OSError as error:
    raise errors.InputError(
      f"{path} cannot be read ({error.strerror}); give {wanted}"
    ) from error
  except UnicodeDecodeError as error:
    raise errors.InputError(
      f"{path} is not text in UTF-8 (byte {error.start}); give {wanted}"
    ) from error
  return list(_lines(text))


def _lines(text: str) -> Iterator[str]:
  """Yields lines; unlike `splitlines` no separator within a token ends one."""
  for line in text.removesuffix("\n").split("\n"):
    yield line.removesuffix("\r")
