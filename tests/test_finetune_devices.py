"""A fine-tuning step on 8 devices is that on 1, but for rounding."""

import json
import sys

import pytest

from tests import host_devices

NUM_DEVICES = 8
NUM_STEPS = 3


@pytest.fixture(scope="module")
def found():
  """What `main` prints in a process that has the devices."""
  return host_devices.run(
    "tests.test_finetune_devices", NUM_DEVICES, JAX_ENABLE_X64="1"
  )


def test_everything_is_computed_in_float64(found):
  assert found["devices"] == [1, NUM_DEVICES]
  assert found["dtypes"] == ["float64"]


def test_the_states_agree(found):
  assert max(found["differences"].values()) < 1e-10, found["differences"]
  assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-10)


def test_the_step_changed_what_it_trains(found):
  assert found["moved"] > 1e-4


def test_a_device_that_saw_other_images_would_be_noticed(found):
  # The same step on half of the batch: what no exchange would give.
  assert found["difference_of_half"] > 1e-6


def test_one_all_reduce_carries_the_gradients_summed_by_codeword(found):
  trained = found["trained_bytes"]
  large = [size for size in found["all_reduces"] if size >= trained]
  assert len(large) == 1, found["all_reduces"]
  # And the loss; running statistics are equal by then, as XLA sees.
  assert large[0] == trained + 8
  assert large[0] < found["dense_bytes"] / 2
  # Two norms, forward and backward.
  assert 3 <= len(found["all_reduces"]) <= 5


def test_norms_of_each_device_exchange_nothing_else(found):
  assert len(found["all_reduces_of_device_norms"]) == 1
  assert found["difference_of_device_norms"] > 1e-6


def test_a_large_layer_is_spread_with_the_same_result(found):
  assert found["spread_over"] == [NUM_DEVICES]
  assert set(found["differences_of_spread"].values()) == {0.0}


def main() -> None:
  """Takes the steps on 1 and on 8 devices, and prints how far they part."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from pqf_jax import finetune, quantize
  from pqf_jax.core import plan as plans
  from pqf_jax.core import trees
  from pqf_jax.kmeans import loop
  from pqf_jax.preflight import costs
  from pqf_jax.runtime import distributed
  from pqf_jax.tasks import classification
  from tests.pipeline import tiny

  module = tiny.Tiny(num_classes=10)
  draw = np.random.default_rng(0)
  batch = {
    "image": draw.normal(size=(32, 12, 12, 3)),
    "label": draw.integers(0, 10, 32).astype(np.int32),
  }
  dense = module.init(jax.random.key(0), jnp.asarray(batch["image"]))
  rules = [plans.Rule(*rule) for rule in tiny.get_config().rules]
  plan = plans.make_plan(rules, dense)
  quantized, _ = quantize.quantize_params(jax.random.key(1), dense, plan)

  # As if the 4,608 weights of conv1 were many.
  spread_over = []
  fit = loop.fit

  def spy(*arguments, **settings):
    if settings["mesh"] is not None:
      spread_over.append(settings["mesh"].size)
    return fit(*arguments, **settings)

  quantize._MOST_WEIGHTS, loop.fit = 1000, spy
  spread, _ = quantize.quantize_params(
    jax.random.key(1), dense, plan, mesh=distributed.mesh()
  )
  assert spread["params"]["conv1"]["kernel"].codes.is_fully_addressable

  def widen(leaf):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.asarray(leaf, np.float64 if floating else None)

  start = jax.tree.map(widen, quantized)
  optimizer = finetune.cosine_adam(
    learning_rate=1e-3, final_learning_rate=1e-6, num_steps=10
  )

  def train(devices, rows, axis=distributed.AXIS):
    loss_fn = classification.make_loss(
      module.clone(norm_axis=axis).apply, lambda images: images
    )
    mesh = distributed.mesh(tuple(devices))
    state = finetune.init_state(start, optimizer)
    state = jax.device_put(
      jax.tree.map(np.asarray, state), distributed.replicated(mesh)
    )
    placed = {
      name: jax.device_put(value[:rows], distributed.sharded(mesh))
      for name, value in batch.items()
    }
    step = finetune.make_finetune_step(loss_fn, optimizer, mesh=mesh)
    compiled = step.lower(state, placed).compile()
    collectives = costs.find_collectives(compiled.as_text())
    sent = [collective.num_bytes for collective in collectives]
    for _ in range(NUM_STEPS):
      state, metrics = compiled(state, placed)
    used = len(metrics["loss"].sharding.device_set)
    after = trees.flatten(finetune.state_variables(state))
    return used, after, float(metrics["loss"]), sent

  def differences(left, right):
    return {
      path: float(np.abs(np.asarray(left[path]) - right[path]).max())
      for path in left
    }

  def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

  devices = jax.devices()
  one, alone, loss, _ = train(devices[:1], 32)
  many, together, loss_of_all, sent = train(devices, 32)
  _, half, *_ = train(devices, 16)
  *_, by_device, _, sent_by_device = train(devices, 32, axis=None)
  before = trees.flatten(start)
  floats = [x for x in alone.values() if jnp.issubdtype(x.dtype, jnp.floating)]
  found = {
    "devices": [one, many],
    "dtypes": sorted({str(leaf.dtype) for leaf in floats}),
    "differences": differences(alone, together),
    "losses": [loss, loss_of_all],
    "moved": max(differences(alone, before).values()),
    "spread_over": spread_over,
    "differences_of_spread": differences(
      *map(trees.flatten, (quantized, spread))
    ),
    "difference_of_half": max(differences(alone, half).values()),
    "difference_of_device_norms": max(differences(alone, by_device).values()),
    "all_reduces": sent,
    "all_reduces_of_device_norms": sent_by_device,
    "trained_bytes": num_bytes(finetune.init_state(start, optimizer).trainable),
    "dense_bytes": 2 * num_bytes(dense["params"]),  # dense is float32
  }
  sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
  main()
