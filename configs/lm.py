"""A small decoder of bytes, trained here on the reference of Python.

python main.py --config=configs/lm.py[:16x]
Needs no data: the text comes with Python. Of your own, with train.txt and
test.txt in a folder: --config.data.name=text --config.data.dir=DIR. Trains a
network of 0.9 million weights and compresses it 8 times, or 16.
"""

import ml_collections

from configs import common

BYTES = {"8x": 3_502_080 // 8, "16x": 3_502_080 // 16}


def get_config(variant: str = "8x") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: 8x or 16x.
  """
  size = common.one_word(variant, BYTES)

  config = common.get_config()
  config.task = "language"
  config.name = f"lm_{size}"
  config.model.name = "decoder"
  config.model.positions = 128
  config.model.features = 128
  config.model.heads = 4
  config.model.depth = 4
  config.model.scanned = False  # one stack, for large networks
  config.data.name = "pydoc"
  config.target_bytes = BYTES[size]
  config.quantize.kmeans_steps = 100
  config.calibrate.images = 128
  common.train_transformer(config, epochs=6, finetune_epochs=2)
  return config
