"""Every field that the code reads, with the paper's values as defaults.

A recipe is a short file that calls `get_config` and sets what differs. Its
variants are words after a colon: `--config=configs/resnet18.py:cifar10,large`.
"""

from collections.abc import Collection

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The settings shared by all recipes (section 4.1 of arXiv 2010.15703)."""
  config = ml_collections.ConfigDict()

  # What is run; --help lists the modes. 'preflight' needs neither data nor the
  # chips of the topology.
  config.mode = "compress"
  config.image = ""  # of the mode 'predict'
  config.topology = ""  # v5e:2x4, v5e:16x16, v6e:4x4, v5p:2x2x1, h100:8, ...
  config.task = "classification"  # 'detection', 'embedding', 'language'
  config.name = ""  # names the default workdir, runs/<name>
  config.seed = 0  # of all that is random

  # Several processes: 'auto' joins them where the environment names a cluster
  # (TPU pods, Slurm, JAX_COORDINATOR_ADDRESS), 'on' insists, 'off' is alone.
  config.distributed = "auto"
  config.distributed_timeout = 300  # seconds to wait for the others

  # Folder of compiled programs, which later runs then need not compile; 'auto'
  # is JAX_COMPILATION_CACHE_DIR, or pqf_jax/ in the user's cache folder, 'off'
  # none. Beyond so many megabytes those that were unused for longest go.
  config.compilation_cache = "auto"
  config.compilation_cache_megabytes = 200

  # Weights of the trained network: .safetensors or .pth with torch's names, the
  # compressed files of the paper's authors, a file of this library, or a hub's,
  # hf://OWNER/REPO[/FILE]. Empty: stage 0 trains the network from scratch.
  config.weights = ""

  # A trained classifier whose layers stage 0 begins with, where it trains a
  # network around them (the backbone of a detector), or the same network with
  # another number of classes; files as in `weights`, which leave this unused.
  config.backbone = ""

  # Arguments of pqf_jax.models.<name>.make, apart from the name itself. Where
  # a recipe has num_classes, 0 stands for as many as the data set has.
  config.model = ml_collections.ConfigDict()
  config.model.name = ""

  config.data = ml_collections.ConfigDict()
  # 'image_folder', 'tfds:NAME', 'imagenet2012', 'cifar10' or 'digits'; 'coco'
  # for a detector.
  config.data.name = ""
  # Parent folder of the prepared data set, or the folder of train/ and val/.
  config.data.dir = ""
  # Folder of images that calibration and fine-tuning take instead of those of
  # train/; they need no labels, so all of the loss must follow the teacher.
  config.data.unlabelled = ""
  config.data.image_size = 0  # pixels; 0: as is usual for the data set
  # How an image becomes one of that size, where that is not to be as is usual
  # for the data set (-1, 0 or ''); see pqf_jax.data.Preparation.
  config.data.resize = -1  # pixels of the short side; 0: images are not resized
  config.data.crop = 0  # pixels a side
  config.data.padding = -1  # black pixels around an image before its 'crop'
  # 'crop' and 'random_resized_crop', either with ',flip'; 'flip' or 'none'.
  config.data.augmentation = ""
  config.data.num_objects = 0  # most in an image; 0: as many as there are
  # Of text: tokens that a sequence has at most (0: those of the network), and
  # the network's vocab.txt (empty: the one beside `weights`).
  config.data.length = 0
  config.data.vocabulary = ""
  # Of red, green and blue in 0..1; empty: those of the data set.
  config.data.mean = ()
  config.data.std = ()

  # (pattern, num_codes or None, channels a sub-vector, k-means steps, axes), of
  # which the first two must be; see pqf_jax.core.plan.Rule. The first that
  # matches a kernel's path decides.
  config.rules = ()
  # If not 0, the rules are not these but those that lose least within so many
  # bytes of a packed file, without its header; docs/budget.md.
  config.target_bytes = 0

  config.permute = ml_collections.ConfigDict()
  # 'assignment' is ours; 'paper' the sorted start and 10,000 random swaps of
  # the paper, judged by one kernel a group; 'none' leaves the order as it is.
  config.permute.search = "assignment"
  # If not 0, an order is also judged by a k-means of so many steps.
  config.permute.kmeans_steps = 0

  config.quantize = ml_collections.ConfigDict()
  # The paper's annealed k-means (SR-C); False: plain k-means, to compare with.
  config.quantize.annealed = True
  config.quantize.kmeans_steps = 1000  # of rules for `target_bytes`

  # Between quantize and fine-tune: codes, codebooks, norms and biases chosen by
  # the outputs of training images, without labels or training; see
  # pqf_jax.calibrate. 0 images leave the stage out.
  config.calibrate = ml_collections.ConfigDict()
  config.calibrate.images = 1024
  config.calibrate.rounds = 2  # improvements of the codes
  config.calibrate.damping = 1e-3
  # Where the fine-tuning starts: 'calibrated' suits few epochs; after nine on
  # CIFAR-10 'quantized' ends .2 % higher (docs/experiments.md).
  config.finetune_from = "quantized"

  # Patterns of paths that no training changes, besides codes and statistics.
  config.frozen = ()

  # Of activations and products in training steps: 'float32' or 'bfloat16'.
  # Codebooks, all other weights, statistics and evaluation stay float32.
  config.dtype = "float32"

  # Over what norms take their statistics in training: 'batch', all devices, or
  # 'device', each its own images; running statistics are then their mean.
  config.norm_statistics = "batch"  # a detector's are frozen

  # Stage 0, where there are no weights to start from, and stage 3.
  config.train = training(epochs=0)
  # Share of the learning rate for what comes from `backbone`.
  config.train.backbone_rate = 1.0
  config.finetune = training(epochs=9)
  # The share of the fine-tuning loss, 0 to 1, that compares with the outputs of
  # the dense network instead of the labels, at this temperature; with 1 labels
  # are not looked at. The paper has none.
  config.distillation = ml_collections.ConfigDict()
  config.distillation.share = 0.0
  config.distillation.temperature = 1.0
  # Whether a classifier sees each image and its mirror image in a step, whose
  # target is the mean of what the teacher says of both: a better teacher of
  # photographs. A step then has twice as many images as batch_size.
  config.distillation.mirrored = False

  # Types in the packed file; see pqf_jax.Storage. A finished workdir is only
  # packed and evaluated again where they change.
  config.storage = ml_collections.ConfigDict()
  config.storage.codebook = "float16"  # or 'int8'
  config.storage.rest = "float32"  # or 'float16', of weights that stay dense

  # Which weights of the fine-tuning are packed: 'last', as the paper reports,
  # or 'best' by the test images (which then are no longer unseen): top-1, or
  # mask AP.
  config.pack = "last"

  config.eval_batch_size = 256  # images, over all devices
  config.checkpoint_steps = 500  # steps between saves; evaluated epochs too
  config.tensorboard = False  # whether curves are written for it
  return config


def training(*, epochs: int) -> ml_collections.ConfigDict:
  """The settings that both trainings have."""
  settings = ml_collections.ConfigDict()
  settings.epochs = epochs  # 0: no training
  settings.evaluation_epochs = 1  # between evaluations
  # Images of a step, over all devices. Each device takes its share in so many
  # microbatches, one after the other, of which the step follows the mean: less
  # memory, and norms see a microbatch of all devices at a time.
  settings.batch_size = 128
  settings.microbatches = 1
  # If not 0, both learning rates are for batches of this size and grow in
  # proportion for larger ones (arXiv 1706.02677).
  settings.base_batch_size = 0
  # 'adam', 'adamw' or 'sgd'. The rate rises from 0 during the warm-up, then
  # falls along a cosine.
  settings.optimizer = "adam"
  settings.learning_rate = 1e-3
  settings.final_learning_rate = 1e-6
  settings.warmup_epochs = 0.0
  settings.weight_decay = 0.0  # of 'adamw' and 'sgd'; spares norms and biases
  settings.momentum = 0.0  # of 'sgd'
  # If not 0, weights and statistics are averaged over the steps, each of which
  # leaves so much of the average; the average is evaluated and packed.
  settings.ema_decay = 0.0
  return settings


def variant_words(variant: str, allowed: Collection[str]) -> set[str]:
  """The comma-separated words of a config's argument string.

  Raises:
    ValueError: a word that the recipe does not know.
  """
  words = set(filter(None, variant.split(",")))
  unknown = words - set(allowed)
  if unknown:
    raise ValueError(
      f"this config has no variant {', '.join(sorted(unknown))!r}; its words "
      f"are {', '.join(sorted(allowed))}"
    )
  return words


def one_word(variant: str, allowed: Collection[str]) -> str:
  """Returns the only word of a variant that has one.

  Raises:
    ValueError: there are several, none, or another.
  """
  words = variant_words(variant, allowed)
  if len(words) != 1:
    raise ValueError(f"name one of {', '.join(allowed)}, not {variant!r}")
  return words.pop()


def train_transformer(
  config: ml_collections.ConfigDict, *, epochs: int, finetune_epochs: int
) -> None:
  """Sets how the small transformers are trained, and follow themselves."""
  for settings in (config.train, config.finetune):
    settings.optimizer = "adamw"
    settings.batch_size = 32
  config.train.epochs = epochs
  config.train.learning_rate = 2e-3
  config.train.warmup_epochs = epochs / 10
  config.finetune_from = "calibrated"
  config.finetune.epochs = finetune_epochs
  config.finetune.learning_rate = 5e-4
  config.distillation.share = 1.0


# Words of a variant: the settings of the paper, which are the default, or those
# that measured best.
RECIPES = ("paper", "best")


def choose_recipe(
  config: ml_collections.ConfigDict,
  words: Collection[str],
  target_bytes: int,
  *,
  mirrored: bool = True,
) -> ml_collections.ConfigDict:
  """Returns a classifier's config, with other settings for the word `best`.

  They were measured on CIFAR-10 (docs/experiments.md): the bytes are divided
  among the layers by what each loses, and smaller numbers leave more of them
  for codes; the fine-tuning follows the dense network alone, which looks at
  each image and its mirror image, at half the paper's rate, and averages the
  weights. It costs 1.5 times the paper's 9 epochs.

  Args:
    config: the recipe.
    words: of its variant.
    target_bytes: for `best`; those of the paper's rules in `config.rules`.
    mirrored: for `best`; see `config.distillation`. False where the mirror
      image of an image may be of another class, such as of letters.

  Raises:
    ValueError: both words are there.
  """
  if {*RECIPES} <= {*words}:
    raise ValueError(f"name one of {', '.join(RECIPES)}, not both")
  if "best" in words:
    config.name += "_best"
    config.target_bytes = target_bytes
    config.storage.codebook = "int8"
    config.storage.rest = "float16"
    config.finetune_from = "quantized"
    config.finetune.epochs = 8
    config.distillation.share = 1.0
    config.distillation.temperature = 4.0
    config.finetune.learning_rate = 5e-4
    config.finetune.ema_decay = 0.998
    config.distillation.mirrored = mirrored
    if mirrored:  # with their mirror images as many in a step as without
      config.finetune.epochs = 5
      config.finetune.batch_size //= 2
  return config


def resnet_rules(
  *, conv3x3: str, conv1x1: str, large: bool, channels1x1: int, fc_codes: int
) -> tuple[tuple[str, int | None, int, int], ...]:
  """The paper's rules for ResNets (its section 4.1).

  Args:
    conv3x3: pattern of the 3x3 convolutions of a block.
    conv1x1: pattern of its 1x1 convolutions.
    large: large blocks, that is two input channels of a 3x3 share a sub-vector.
    channels1x1: input channels of a 1x1 convolution that share one.
    fc_codes: codewords of the classifier.
  """
  steps = 1000
  return (
    ("params/conv1/kernel", None, 1, steps),
    ("params/fc/kernel", fc_codes, 4, steps),
    (conv1x1, 256, channels1x1, steps),
    (conv3x3, 256, 2 if large else 1, steps),
  )
