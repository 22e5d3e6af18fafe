import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.models import efficientnet_lite0
from tests.oracles import mobile_weights, resnet_weights

WEIGHTS = resnet_weights.draw(mobile_weights.efficientnet_lite0())
OTHER_FIRST_BLOCK = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
OTHER_BLOCK = ["_expand_conv", "_bn0", *OTHER_FIRST_BLOCK]
NUM_BLOCKS = 16


def other_modules():
  """Yields the modules of efficientnet_pytorch in the order they run."""
  yield from ("_conv_stem", "_bn0")
  for i in range(NUM_BLOCKS):
    for name in OTHER_BLOCK if i else OTHER_FIRST_BLOCK:
      yield f"_blocks.{i}.{name}"
  yield from ("_conv_head", "_bn1", "_fc")


def other_generation():
  """Returns the weights under the names of efficientnet_pytorch."""
  modules = dict.fromkeys(name.rpartition(".")[0] for name in WEIGHTS)
  renamed = dict(zip(modules, other_modules(), strict=True))
  entries = {}
  for name, value in WEIGHTS.items():
    module, _, entry = name.rpartition(".")
    entries[f"{renamed[module]}.{entry}"] = value
  return entries


@functools.cache
def template():
  model = efficientnet_lite0.make(num_classes=mobile_weights.NUM_CLASSES)
  images = jnp.zeros((1, 32, 32, 3))
  return jax.eval_shape(model.init, jax.random.key(0), images)


def test_both_generations_of_names_give_the_same_variables():
  entries = other_generation()
  assert "_blocks.15._project_conv.weight" in entries
  one = efficientnet_lite0.load_torch(entries, template())
  other = efficientnet_lite0.load_torch(WEIGHTS, template())
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_counters_of_the_other_generation_are_dropped():
  entries = other_generation() | {"_bn0.num_batches_tracked": np.array(3)}
  efficientnet_lite0.load_torch(entries, template())


def test_missing_weights_are_listed_by_timms_names():
  entries = other_generation()
  del entries["_blocks.3._expand_conv.weight"]
  entries["_blocks.16._bn0.bias"] = np.zeros(3)
  with pytest.raises(errors.InputError) as caught:
    efficientnet_lite0.load_torch(entries, template())
  assert "1 missing (blocks.2.0.conv_pw.weight)" in str(caught.value)
  assert "1 extra (_blocks.16._bn0.bias)" in str(caught.value)
