"""A small vision transformer, trained here on digits.

python main.py --config=configs/vit.py[:16x]
Needs no data: 1,797 digits of 8 x 8 pixels come with scikit-learn. Trains a
network of 0.2 million weights and compresses it 8 times, or 16.
"""

import ml_collections

from configs import common

BYTES = {"8x": 808_232 // 8, "16x": 808_232 // 16}


def get_config(variant: str = "8x") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: 8x or 16x.
  """
  size = common.one_word(variant, BYTES)

  config = common.get_config()
  config.name = f"vit_{size}"
  config.model.name = "vit"
  config.model.num_classes = 10
  config.model.image_size = 8
  config.model.patch = 2
  config.model.features = 64
  config.model.heads = 4
  config.model.depth = 4
  config.data.name = "digits"
  config.data.image_size = 8
  config.target_bytes = BYTES[size]
  config.quantize.kmeans_steps = 100
  common.train_transformer(config, epochs=20, finetune_epochs=5)
  return config
