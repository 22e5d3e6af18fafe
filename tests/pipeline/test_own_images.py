"""Folders of images of one's own, from a network for other classes."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from configs import mask_rcnn
from pqf_jax import data, errors, pack, pipeline, tasks
from pqf_jax.core import trees
from pqf_jax.models import efficientnet_lite0, torch_names
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import weights
from tests.oracles import mobile_weights, resnet_weights
from tests.pipeline import tiny

# (red, green, blue) of the images of a class.
CLASSES = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cat": (40, 40, 200)}
NUM_TRAIN, NUM_TEST = 8, 4


def write_images(folder, color, count, rng):
  folder.mkdir(parents=True)
  for number in range(count):
    pixels = color + rng.integers(-40, 40, (12, 16, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    image.save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def top(tmp_path_factory):
  """Images of three classes, others without labels, weights of ten classes."""
  top = tmp_path_factory.mktemp("own")
  rng = np.random.default_rng(0)
  for name, color in CLASSES.items():
    write_images(top / "data/train" / name, color, NUM_TRAIN, rng)
    write_images(top / "data/val" / name, color, NUM_TEST, rng)
    write_images(top / "more" / name, color, 5, rng)
  variables = tiny.make(num_classes=10).init(
    jax.random.key(1), np.zeros((1, 8, 8, 3), np.float32)
  )
  state_dict = torch_names.flax_to_torch(variables)
  safetensors.numpy.save_file(
    {f"module.model.{name}": x for name, x in state_dict.items()},
    top / "tiny.safetensors",
  )
  return top


@pytest.fixture
def own(config, top):
  config.name = "own"
  config.data.name = "image_folder"
  config.data.dir = str(top / "data")
  config.data.image_size = 0
  config.model.num_classes = 0
  config.backbone = str(top / "tiny.safetensors")
  config.train.batch_size = 8
  config.train.epochs = 12
  config.train.backbone_rate = 0.1
  config.finetune.batch_size = 8
  config.eval_batch_size = 8
  config.rules = (("params/conv1/kernel", 32, 2, 10), ("params/.*", None))
  return config


def run(config, folder):
  pipeline.run(config, str(folder))
  return json.loads((folder / "results.json").read_text())


def test_from_weights_with_a_prefix_to_a_packed_file(own, tmp_path, capsys):
  results = run(own, tmp_path)
  said = " ".join(capsys.readouterr().out.split())
  assert "image_folder: 3 classes" in said
  assert "names without 'module.'" in said and "without 'model.'" in said
  assert "10 of 12 variables are taken over, not params/fc/bias" in said
  assert results["images"] == 3 * NUM_TEST
  assert results["top1_dense"] == results["top1_packed"] == 1
  file = tmp_path / "model.safetensors"
  assert pack.read_header(file)["architecture"]["num_classes"] == 3
  network = tiny.make(num_classes=3)
  color = np.full((1, 12, 12, 3), CLASSES["bee"], np.float32)
  dataset = data.get_dataset("image_folder", data_dir=own.data.dir)
  images = data.normalize(jax.numpy.asarray(color), dataset.mean, dataset.std)
  assert int(network.apply(pack.load(file), images).argmax()) == 1
  # The same command again: the classes are counted to the same config.
  pipeline.run(own, str(tmp_path))
  assert "already done" in capsys.readouterr().out
  # The config of the caller is as it was.
  assert own.model.num_classes == 0


def test_what_is_taken_over_may_stay_as_it_is(own, top, tmp_path):
  own.train.backbone_rate = 0.0
  own.train.epochs = 1
  own.finetune.epochs = 0
  own.permute.search = "none"
  own.rules = (("params/.*", None),)
  run(own, tmp_path)
  packed = trees.flatten(pack.load(tmp_path / "model.safetensors"))
  stored = safetensors.numpy.load_file(top / "tiny.safetensors")
  kernel = stored["module.model.conv1.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(packed["params/conv1/kernel"], kernel)
  assert np.any(packed["params/fc/bias"])  # which begins with zeros


@pytest.mark.parametrize("num_classes", [2, 10, 12])
@pytest.mark.parametrize("kind", ["torch", "packed", "headless"])
def test_all_but_the_head_is_taken_over(tmp_path, num_classes, kind):
  variables = tiny.make(num_classes=10).init(
    jax.random.key(2), np.zeros((1, 8, 8, 3), np.float32)
  )
  path = tmp_path / "w.safetensors"
  if kind == "packed":
    pack.save(path, variables)  # a dense network keeps its statistics
  else:
    state_dict = torch_names.flax_to_torch(variables)
    if kind == "headless":
      state_dict = {k: v for k, v in state_dict.items() if "fc" not in k}
    safetensors.numpy.save_file(state_dict, path)
  sample = (np.zeros((1, 8, 8, 3), np.float32),)
  template = jax.eval_shape(
    tiny.make(num_classes=num_classes).init, jax.random.key(0), *sample
  )
  found = weights.read_backbone(
    str(path),
    {"name": "tiny", "num_classes": num_classes},
    template,
    norm_epsilon=1e-3,
    sample=sample,
  )
  head = {"params/fc/kernel", "params/fc/bias"}
  flat = trees.flatten(variables)
  assert found.keys() == flat.keys() - head
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, flat[path])


def test_a_model_without_classes_has_no_head():
  with pytest.raises(errors.InputError, match="'bert' is not built around"):
    weights.read_backbone(
      "x.safetensors", {"name": "bert"}, {}, norm_epsilon=None, sample=()
    )


def test_efficientnets_other_names_of_a_head_are_known(tmp_path):
  state_dict = resnet_weights.draw(mobile_weights.efficientnet_lite0(7))
  old = {new: old for old, new in efficientnet_lite0._timm_names().items()}
  state_dict = torch_names.rename_modules(state_dict, old)
  assert "_fc.weight" in state_dict
  safetensors.numpy.save_file(state_dict, tmp_path / "w.safetensors")
  network = efficientnet_lite0.make(num_classes=3)
  sample = (np.zeros((1, 32, 32, 3), np.float32),)
  found = weights.read_backbone(
    str(tmp_path / "w.safetensors"),
    {"name": "efficientnet_lite0", "num_classes": 3},
    jax.eval_shape(network.init, jax.random.key(0), *sample),
    norm_epsilon=network.norm_epsilon,
    sample=sample,
  )
  assert "params/conv_stem/kernel" in found
  assert not any("classifier" in path for path in found)


def test_stage_0_trains_with_labels_and_the_others_without(own, top, tmp_path):
  own.data.unlabelled = str(top / "more")
  own.distillation.share = 1.0
  own.calibrate.images = 15
  counted = jobs.count_classes(own)
  network, _ = jobs.build_network(counted)
  loaded = tasks.get("classification").load(counted, network)
  counts = {"train": 3 * NUM_TRAIN, "finetune": 15}
  for stage, count in counts.items():
    task = loaded.for_stage(stage)
    assert task.num_train == count
    batches = task.train_batches(batch_size=8, seed=0, num_steps=2)
    labels = np.concatenate([np.asarray(batch["label"]) for batch in batches])
    assert ((labels >= 0) if stage == "train" else (labels == -1)).all()
  fingerprints = {loaded.fingerprint(), loaded.labelled.fingerprint()}
  assert len(fingerprints) == 2
  assert run(own, tmp_path)["top1_dense"] == 1
  # Without a stage 0 nothing needs labels of training images.
  counted.weights = "some file"
  assert tasks.get("classification").load(counted, network).labelled is None


def test_weights_leave_the_backbone_alone(own, tmp_path):
  variables = tiny.make(num_classes=3).init(
    jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)
  )
  pack.save(tmp_path / "own.safetensors", variables)
  own.weights = str(tmp_path / "own.safetensors")
  own.backbone = "hf://nobody/nothing"
  own.train.batch_size = 5000  # nor is anything trained in stage 0
  own.rules = (("params/.*", None),)
  own.finetune.epochs = 0
  assert run(own, tmp_path / "run")["images"] == 3 * NUM_TEST


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"weights": "tiny.safetensors", "backbone": ""},
      "fc.bias is .10,., the model has .3,.* give them as config.backbone",
    ),
    (
      {
        "model.name": "resnet",
        "model.depth": 18,
        "rules": (("params/.*", None),),
      },
      "tiny.safetensors: the weights do not fit the model: .* missing",
    ),
    ({"train.batch_size": 25}, "train.batch_size is 25, but there are 24"),
    ({"data.dir": ""}, "num_classes is 0, .* counted: image_folder needs"),
    ({"data.crop": 13, "data.resize": 12}, "data.crop is 13, but images are"),
    ({"data.padding": 12}, "data.padding is 12, so that crops of 12"),
    ({"data.augmentation": "mixup"}, "data.augmentation is 'mixup'; it must"),
    ({"train.backbone_rate": 2.0}, "train.backbone_rate is 2.0; give 0 to 1"),
    (
      {"task": "detection"},
      "num_classes is 0, but task 'detection' does not count",
    ),
    ({"data.unlabelled": "more"}, "distillation.share is 0, so that"),
    ({"distillation.mirrored": True}, "mirrored is True, but .*share is 0"),
    ({"data.unlabelled": "nope"}, "unlabelled is '.*nope', which is no folder"),
  ],
)
def test_what_does_not_fit_is_refused_before_any_work(
  own, top, tmp_path, changes, message
):
  for name in ("weights", "data.unlabelled"):
    if name in changes:
      changes = changes | {name: str(top / changes[name])}
  with own.unlocked():
    own.update_from_flattened_dict(changes)
  with pytest.raises(errors.InputError, match=message):
    pipeline.run(own, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_plan_refuses_a_folder_that_is_not_there(own):
  own.mode, own.data.unlabelled = "plan", "/nope"
  with pytest.raises(errors.InputError, match="unlabelled is '/nope', which"):
    pipeline.run(own, None)


def test_plan_counts_classes_too(own, capsys):
  own.mode = "plan"
  pipeline.run(own, None)
  assert "payload_bytes=" in capsys.readouterr().out


def test_a_detector_resizes_images_itself():
  config = mask_rcnn.get_config("nuclei")
  config.data.crop = 8
  with pytest.raises(errors.InputError, match="data.crop is 8, of which task"):
    tasks.get("detection").check(config, None, {}, num_devices=1)
