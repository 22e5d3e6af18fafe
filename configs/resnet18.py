"""ResNet-18 on handwritten digits, CIFAR-10 or ImageNet.

python main.py --config=configs/resnet18.py
Handwritten digits, which come with scikit-learn: trains, compresses and packs
in a few minutes on two CPU cores.
python main.py --config=configs/resnet18.py:cifar10[,large][,best] \
        --config.data.dir=DIR --config.weights=FILE.safetensors
CIFAR-10, small or large blocks; 32.1x or 52.2x smaller.
python main.py --config=configs/resnet18.py:imagenet2012[,large][,best] \
        --config.data.dir=DIR
The paper: 1.54 MiB (29x) 66.74 % top-1, large 1.03 MiB (43x) 63.33 %; of 69.76.
The weights come from the hub. Nine epochs take 22 minutes of steps on one H100
(8,588 images/s, measured) if the loader keeps up, and at least 17 minutes on a
v5e-8 (the compiler's estimate).
"""

import ml_collections

from configs import common


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: digits, cifar10 or imagenet2012; [large], [best].
  """
  datasets = ("digits", "cifar10", "imagenet2012")
  words = common.variant_words(variant, (*datasets, "large", *common.RECIPES))
  chosen = words & set(datasets) or {"digits"}
  if len(chosen) > 1:
    raise ValueError(f"name one data set, not {', '.join(sorted(chosen))}")
  (dataset,) = chosen
  large = "large" in words

  config = common.get_config()
  config.name = "_".join(["resnet18", dataset] + ["large"] * large)
  config.model.name = "resnet"
  config.model.depth = 18
  config.model.num_classes = 1000 if dataset == "imagenet2012" else 10
  config.model.stem = "small" if dataset == "cifar10" else "imagenet"
  config.data.name = dataset
  config.rules = common.resnet_rules(
    conv3x3="params/layer././conv[12]/kernel",
    conv1x1="params/layer./0/downsample/0/kernel",
    large=large,
    channels1x1=4,
    fc_codes=2048,
  )
  if dataset == "imagenet2012":
    config.weights = "hf://timm/resnet18.tv_in1k"
    # The activations of these images are in memory, layer by layer.
    config.calibrate.images = 256
  if dataset == "digits":
    # A small problem on a small machine: few epochs suffice, and k-means
    # converges long before the paper's 1,000 steps.
    config.rules = tuple((*rule[:3], 50) for rule in config.rules)
    config.train.epochs = 7
    config.train.batch_size = 64
    config.finetune.batch_size = 64
  target_bytes = {
    "digits": (1_422_888, 886_312),
    "cifar10": (1_392_168, 855_592),
    "imagenet2012": (1_615_904, 1_079_328),
  }[dataset][large]
  return common.choose_recipe(
    config, words, target_bytes, mirrored=dataset != "digits"
  )
