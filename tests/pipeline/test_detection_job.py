"""The whole job on a few generated images with objects."""

import json

import jax
import pytest
from PIL import Image

from configs import mask_rcnn as recipe
from pqf_jax import errors, pack, pipeline
from pqf_jax.core import trees
from pqf_jax.models import mask_rcnn, resnet
from tests.data.coco import tiny_coco

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("detection")


@pytest.fixture
def config(folder):
  data_dir = folder / "data"
  if not data_dir.exists():
    tiny_coco.write(data_dir)
  config = recipe.get_config("nuclei")
  config.data.dir = str(data_dir)
  config.model.update(num_classes=4, min_size=64, max_size=64)
  with config.unlocked():
    config.model.depth = 18
  config.rules = tuple((*rule[:3], 3, *rule[4:]) for rule in config.rules)
  for stage in (config.train, config.finetune):
    stage.epochs, stage.batch_size = 1, 2
  config.eval_batch_size = 2
  return config


def test_train_compress_and_predict(config, folder):
  classifier = resnet.make(depth=18, num_classes=1000)
  variables = classifier.init(
    jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3))
  )
  pack.save(folder / "resnet18.safetensors", variables)
  config.backbone = str(folder / "resnet18.safetensors")
  workdir = folder / "run"
  pipeline.run(config, str(workdir))

  results = json.loads((workdir / "results.json").read_text())
  for stage in ("dense", "permuted", "quantized", "finetuned", "packed"):
    assert -1 <= results[f"mask_ap_{stage}"] <= 1
    assert -1 <= results[f"box_ap_{stage}"] <= 1
  # Equal but for the order of equal scores.
  assert results["mask_ap_permuted"] == pytest.approx(
    results["mask_ap_dense"], abs=0.01
  )
  assert "data:image/png;base64," in (workdir / "report.html").read_text()

  # The norms of the backbone are frozen; the heads are not.
  packed = trees.flatten(pack.load(workdir / "model.safetensors"))
  scale = packed["params/backbone/body/bn1/scale"]
  assert float(abs(scale - scale[0]).max()) < 1e-6  # as they were drawn: ones

  with config.unlocked():
    config.mode = "predict"
  config.weights = str(workdir / "model.safetensors")
  config.image = str(next((folder / "data").rglob("val2017/*")))
  pipeline.run(config, str(folder / "predict"))
  found = json.loads((folder / "predict/detections.json").read_text())
  assert isinstance(found, list)
  assert all({"bbox", "score", "segmentation"} <= row.keys() for row in found)
  assert Image.open(folder / "predict/detections.png").size[0] > 64


def test_predict_wants_an_image(config, tmp_path):
  config.mode = "predict"
  with pytest.raises(errors.InputError, match="--config.image=FILE"):
    pipeline.run(config, str(tmp_path))


def test_a_backbone_of_another_depth_is_refused(config, folder):
  shallow = resnet.make(depth=34, num_classes=1000)
  variables = shallow.init(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
  pack.save(folder / "resnet34.safetensors", variables)
  config.backbone = str(folder / "resnet34.safetensors")
  with pytest.raises(errors.InputError, match="extra"):
    pipeline.run(config, str(folder / "other"))


assert mask_rcnn  # looked up by name
