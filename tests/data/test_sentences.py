"""Sentences as tokens; the expected ones are those of `tokenizers` 0.22."""

import pytest

from pqf_jax import errors
from pqf_jax.data import sentences

# fmt: off
TOKENS = [
  "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a",
  "a", "b", "!", ",", "$", "+", "'", "é", "e", "##e", "cafe", "中", "国", "ß",
  "ss", "don", "t", "the", "##the", "mask", "[", "]", "..",
]
# fmt: on
EXPECTED = {
  "Unaffable!": "un ##aff ##able !",
  "UNAFFABLEs": "[UNK]",
  " a\t b\r\nb\u00a0a": "a b b a",
  "café Cafe\u0301 CAFÉ": "cafe cafe cafe",
  "中国a": "中 国 a",
  "a,b!!": "a , b ! !",
  "don't": "don ' t",
  "$a+b": "$ a + b",
  "ß": "ß",
  "a\u200bb\x00b\ufffd": "[UNK]",
  "aee thethe the-the": "a ##e ##e the ##the the [UNK] the",
  "": "",
  "a" * 101: "[UNK]",
  "eee": "e ##e ##e",
  "e" * 100: "e" + " ##e" * 99,
  "İ": "[UNK]",
  "..": "[UNK] [UNK]",
  "a\u2028b": "a b",
}


@pytest.fixture
def vocabulary(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("\n".join(TOKENS) + "\n", "utf-8")
  return sentences.Vocabulary(path)


def test_words_are_cut_as_bert_does(vocabulary):
  for sentence, tokens in EXPECTED.items():
    first, *inner, last = vocabulary.tokenize(sentence)
    assert (TOKENS[first], TOKENS[last]) == ("[CLS]", "[SEP]")
    assert " ".join(TOKENS[number] for number in inner) == tokens, sentence


def test_long_sentences_keep_their_end(vocabulary):
  whole = vocabulary.tokenize("a b a b")
  assert vocabulary.tokenize("a b a b", 4) == [*whole[:3], whole[-1]]
  assert vocabulary.tokenize("a b a b", 6) == whole


def test_rows_are_padded_to_the_longest(vocabulary, tmp_path):
  (tmp_path / "train.txt").write_text("a b\n\nb!\r\n", "utf-8")
  (tmp_path / "test.txt").write_text("a\nun a b a b a", "utf-8")
  given = sentences.load(str(tmp_path), vocabulary, longest=6)
  assert (len(given.train), len(given.test), given.length) == (2, 2, 6)
  number = {token: i for i, token in enumerate(TOKENS)}
  row = given.train_row(1, None)["tokens"]
  wanted = [number[token] for token in ("[CLS]", "b", "!", "[SEP]")]
  assert row.tolist() == [*wanted, 0, 0]
  assert given.test_row(1)["tokens"][-1] == number["[SEP]"]


def test_what_is_no_text_is_refused(vocabulary, tmp_path):
  def refused(message, folder=tmp_path):
    with pytest.raises(errors.InputError, match=message):
      sentences.load(str(folder), vocabulary, longest=6)

  refused("need config.data.dir", "")
  refused("train.txt cannot be read .No such file")
  (tmp_path / "train.txt").write_text("a\nb\n")
  (tmp_path / "test.txt").write_bytes(b"a\n\xff\n")
  refused("test.txt is not text in UTF-8 .byte 2")
  (tmp_path / "test.txt").write_text("\n a \n")
  refused("test.txt has 1 sentences; give two or more")


def test_a_missing_vocabulary_can_be_given(tmp_path):
  with pytest.raises(errors.InputError, match="give .*data.vocabulary=FILE"):
    sentences.Vocabulary(tmp_path / "vocab.txt")


@pytest.mark.parametrize("tokens", ["a\nb", "[UNK]\n[PAD]\n[CLS]\n[SEP]", ""])
def test_another_file_is_no_vocabulary(tmp_path, tokens):
  path = tmp_path / "vocab.txt"
  path.write_text(tokens)
  with pytest.raises(errors.InputError, match="is no vocabulary of BERT"):
    sentences.Vocabulary(path)


def test_a_vocabulary_has_a_number_for_each_line(tmp_path):
  path = tmp_path / "vocab.txt"
  lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "the", "cat"]
  path.write_text("\n".join(lines))
  vocabulary = sentences.Vocabulary(path)
  assert vocabulary.tokenize("the cat") == [2, 5, 6, 3]
  assert len(vocabulary) == 7  # a network of six tokens has no vector of "cat"
