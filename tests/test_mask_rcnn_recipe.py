import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from configs import mask_rcnn
from pqf_jax import finetune, models
from pqf_jax.core import plan as plans
from pqf_jax.core import trees
from pqf_jax.pipeline import settings


@functools.cache
def traced(name: str, **settings: Any) -> Any:
  """Returns the variables of a network as shapes."""
  return jax.eval_shape(
    models.get_model(name).make(**settings).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )


@functools.cache
def planned(variant: str) -> tuple[Any, plans.SizeReport, Any]:
  config = mask_rcnn.get_config(variant)
  template = traced(**config.model)
  rules = [plans.Rule(*rule) for rule in config.rules]
  plan = plans.make_plan(rules, template)
  return plan, plans.predict_size(plan, template), template


def test_the_published_size():
  """6.65 MiB and 25.5x, see the table of uber-research's README."""
  plan, size, _ = planned("coco")
  assert len(plan) == 70
  assert size.payload_bytes == 6_967_876
  assert round(size.payload_bytes / 2**20, 3) == 6.645
  assert round(size.ratio, 1) == 25.5


def test_every_kernel_has_the_published_codebook():
  plan, size, _ = planned("coco")
  first = "params/backbone/body/layer1/0/conv1/kernel"
  fewer = {path for path, layer in plan.items() if layer.num_codes != 256}
  assert fewer == {first}
  assert plan[first].num_codes == 128
  lengths = {
    row.path: (row.length, row.shape) for row in size.layers if row.length
  }
  for path, (length, shape) in lengths.items():
    taps = {(3, 3): 9, (2, 2): 4, (1, 1): 4}.get(shape[:-2], 4)
    assert length == (16 if "fc6" in path else taps), path
  dense = {
    row.path.split("/")[-2]
    for row in size.layers
    if row.path.endswith("kernel") and not row.length
  }
  assert dense == {"conv1", "cls_logits", "bbox_pred", "mask_fcn_logits"}


def test_both_variants_are_recipes_of_detection():
  for variant, classes in (("coco", 91), ("nuclei", 2), ("", 91)):
    config = mask_rcnn.get_config(variant)
    assert config.task == "detection"
    assert config.model.num_classes == classes
  assert mask_rcnn.get_config("coco").train.epochs == 0
  assert mask_rcnn.get_config("nuclei").train.epochs > 0
  assert len(planned("nuclei")[0]) == 70


@pytest.mark.parametrize(
  ("words", "num_trained"),
  [
    ("coco", 0),
    ("nuclei,frozen_norms", 0),
    ("coco,authors_norms", 37),  # as their code does it, if not on purpose
    ("trained_norms", 53),
  ],
)
def test_which_norms_of_the_body_are_trained(words, num_trained):
  config = mask_rcnn.get_config(words)
  state = jax.eval_shape(
    lambda variables: finetune.init_state(
      variables, optax.identity(), config.frozen
    ),
    planned(words)[2],
  )
  norms = [
    path
    for path in trees.flatten(state.trainable)
    if "/body/" in path and path.endswith("scale")
  ]
  assert len(norms) == num_trained
  assert "params/backbone/body/conv1/kernel" in trees.flatten(state.trainable)


def test_the_word_best_keeps_the_size_of_the_rules():
  paper, best = (mask_rcnn.get_config(f"nuclei,{w}") for w in ("paper", "best"))
  assert paper == mask_rcnn.get_config("nuclei")
  settings.check(best)
  assert best.rules == paper.rules
  assert best.calibrate == paper.calibrate
  assert paper.distillation.share == 0 and best.distillation.share == 1
  plan, size, template = planned("nuclei")
  stored = plans.predict_size(plan, template, settings.make_storage(best))
  assert stored.payload_bytes == 6_614_518
  assert size.payload_bytes == 6_759_596


@pytest.mark.parametrize(
  "variant",
  ["large", "coco,nuclei", "voc", "frozen_norms,trained_norms", "coco,best"],
)
def test_other_variants_are_refused(variant):
  with pytest.raises(ValueError, match=r"voc|large|name (one of|both)"):
    mask_rcnn.get_config(variant)
