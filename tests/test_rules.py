"""The paper's rules for networks without names."""

import jax
import jax.numpy as jnp
import pytest

from configs import resnet18, resnet50
from pqf_jax import errors, models, rules
from pqf_jax.core import plan as plans


def net(**settings):
  network = models.get_model("resnet").make(**settings, num_classes=1000)
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  return network.apply, shapes, x


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
  ("depth", "recipe", "settings"),
  [(18, resnet18, {}), (50, resnet50, {"linear_codes": 1024})],
)
def test_the_paper_s_networks_get_the_rules_of_their_recipes(
  depth, recipe, settings, large
):
  config = recipe.get_config("imagenet2012" + ",large" * large)
  apply_fn, shapes, x = net(depth=depth, stem="imagenet")
  if large and depth == 50:
    settings = {**settings, "pointwise_channels": 8}
  make = rules.paper_large if large else rules.paper_small
  found = plans.make_plan(make(apply_fn, shapes, x, **settings), shapes)
  assert found == plans.make_plan(
    [plans.Rule(*rule) for rule in config.rules], shapes
  )


def test_layers_that_suit_no_block_get_the_nearest():
  shapes = {
    "stem": (3, 3, 3, 6),
    "odd": (3, 3, 6, 9),  # 2 channels
    "odder": (3, 3, 9, 5),  # 1
    "depthwise": (3, 3, 1, 5),  # 5 sub-vectors
    "pointwise": (1, 1, 5, 30),  # 1, though 4 are asked for
    "linear": (30, 40),  # 3
  }

  def apply_fn(v, x):
    def conv(x, name, groups=1):
      return jax.lax.conv_general_dilated(
        x,
        v[name],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
      )

    x = conv(conv(conv(x, "stem"), "odd"), "odder")
    x = conv(conv(x, "depthwise", groups=5), "pointwise")
    return x.mean((1, 2)) @ v["linear"]

  variables = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }
  x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
  found = rules.paper_large(apply_fn, variables, x)
  assert {rule.pattern: rule[1:3] for rule in found} == {
    "stem": (None, 1),
    "odd": (256, 2),
    "odder": (256, 1),
    "depthwise": (None, 1),
    "pointwise": (256, 1),
    "linear": (2048, 3),
  }


@pytest.mark.parametrize(
  "settings", [{"pointwise_channels": 0}, {"linear_codes": 1}]
)
def test_numbers_out_of_range_are_refused(settings):
  x = jax.ShapeDtypeStruct((1, 4), jnp.float32)
  with pytest.raises(errors.InputError, match="must be 2 to 65536"):
    rules.paper_small(lambda v, x: x @ v, jnp.ones((4, 4)), x, **settings)
