"""Recipes of classifiers: their words, and settings that pass the checks."""

import pytest

from configs import (
  efficientnet_lite0,
  mobilenet_v2,
  own_images,
  resnet18,
  resnet50,
)
from pqf_jax.core import plan as plans
from pqf_jax.pipeline import job, planning, settings

RECIPES = [
  (resnet18, "digits"),
  (resnet18, "cifar10,large"),
  (resnet50, "imagenet2012,ssl"),
  (mobilenet_v2, "imagenet2012"),
  (efficientnet_lite0, "imagenet2012,large"),
  (own_images, "mobilenet_v2"),
  (own_images, "resnet18,large"),
]


@pytest.mark.parametrize(("recipe", "variant"), RECIPES)
def test_the_word_best_follows_the_teacher_alone(recipe, variant):
  paper = recipe.get_config(variant)
  best = recipe.get_config(f"{variant},best")
  settings.check(best)
  assert paper.distillation.share == paper.finetune.ema_decay == 0
  assert best.distillation.share == 1 and best.finetune.ema_decay > 0.99
  assert best.name == f"{paper.name}_best"
  assert best.rules == paper.rules


@pytest.mark.parametrize(
  ("recipe", "datasets"),
  [
    (resnet18, ("digits", "cifar10", "imagenet2012")),
    (resnet50, ("imagenet2012",)),
    (mobilenet_v2, ("imagenet2012",)),
    (efficientnet_lite0, ("imagenet2012",)),
  ],
)
def test_the_word_best_takes_the_bytes_of_the_rules(recipe, datasets):
  for dataset in datasets:
    for size in ("", ",large"):
      paper = recipe.get_config(f"{dataset}{size}")
      _, template = job.build_network(paper)
      plan = plans.make_plan(settings.make_rules(paper.rules), template)
      assert (
        recipe.get_config(f"{dataset}{size},best").target_bytes
        == plans.predict_size(plan, template).payload_bytes
      )


@pytest.mark.parametrize(("recipe", "variant"), RECIPES)
def test_the_word_paper_is_the_default(recipe, variant):
  assert recipe.get_config(f"{variant},paper") == recipe.get_config(variant)
  with pytest.raises(ValueError, match="name one of paper, best"):
    recipe.get_config(f"{variant},paper,best")


@pytest.mark.parametrize("architecture", own_images.ARCHITECTURES)
def test_own_images_begin_with_the_weights_of_the_architecture(architecture):
  config = own_images.get_config(f"{architecture},large")
  settings.check(config)
  assert config.name == f"{architecture}_own_images_large"
  assert config.backbone.startswith("hf://timm/") and not config.weights
  assert config.model.num_classes == 0  # counted
  assert config.train.epochs and config.train.backbone_rate < 1
  imagenet = own_images.ARCHITECTURES[architecture].get_config(
    "imagenet2012,large"
  )
  assert config.rules == imagenet.rules


def test_own_images_have_one_architecture():
  default = own_images.get_config()
  assert default == own_images.get_config("mobilenet_v2")
  with pytest.raises(ValueError, match="one architecture, not .*18, .*50"):
    own_images.get_config("resnet18,resnet50")


def test_the_rules_suit_a_head_of_two_classes():
  config = own_images.get_config("mobilenet_v2,large")
  config.model.num_classes = 2
  network, template = job.build_network(config)
  plan = planning.make_plan(config, network, template)
  # A fourth of the sub-vectors of 1280 x 2 weights.
  assert plan["params/classifier/1/kernel"].num_codes == 64
