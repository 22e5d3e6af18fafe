import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pqf_jax import finetune
from pqf_jax.core import blocks, vq_array


@pytest.fixture(autouse=True)
def _optax_promotes():
  """Its schedules multiply floats by the integer step."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def _variables():
  node = vq_array.VQArray(
    jax.random.normal(jax.random.key(0), (4, 2)),
    jnp.arange(12, dtype=jnp.uint8).reshape(3, 4) % 4,
    (8, 3),
    blocks.BlockSpec(2),
  )
  stats = {"mean": jnp.zeros(3)}
  return {
    "params": {"fc": {"kernel": node, "bias": jnp.zeros(3)}},
    "batch_stats": {"bn": stats},
  }


def _loss(variables, batch):
  fc = variables["params"]["fc"]
  outputs = batch["x"] @ fc["kernel"].decode() + fc["bias"][None]
  mean = variables["batch_stats"]["bn"]["mean"]
  updated = {"batch_stats": {"bn": {"mean": 0.5 * mean + outputs.mean(0)}}}
  return jnp.square(outputs - batch["y"]).mean(), (
    updated,
    {"scale": mean.max()},
  )


BATCH = {
  "x": jax.random.normal(jax.random.key(1), (16, 8)),
  "y": jax.random.normal(jax.random.key(2), (16, 3)),
}


def test_a_step_is_the_hand_written_one():
  variables = _variables()
  optimizer = optax.sgd(0.1)
  step = finetune.make_finetune_step(_loss, optimizer)
  state, metrics = step(finetune.init_state(variables, optimizer), BATCH)
  after = finetune.state_variables(state)

  # NumPy: dense gradient, then the sum over the sub-vectors of each codeword.
  node = _variables()["params"]["fc"]["kernel"]
  x, y = (np.asarray(BATCH[name], np.float64) for name in "xy")
  dense = np.asarray(node.decode(), np.float64)
  gap = x @ dense - y
  gradient = x.T @ gap * 2 / gap.size
  codebook = np.asarray(node.codebook, np.float64)
  sums = np.zeros_like(codebook)
  np.add.at(sums, np.asarray(node.codes).reshape(-1), gradient.T.reshape(-1, 2))
  got = after["params"]["fc"]["kernel"]
  np.testing.assert_allclose(got.codebook, codebook - 0.1 * sums, rtol=1e-4)
  np.testing.assert_array_equal(got.codes, node.codes)
  np.testing.assert_allclose(metrics["loss"], np.mean(gap**2), rtol=1e-5)
  np.testing.assert_allclose(
    after["batch_stats"]["bn"]["mean"], (gap + y).mean(0), rtol=1e-4
  )


def test_microbatches_follow_the_mean_of_their_gradients():
  optimizer = optax.sgd(0.1)
  states, metrics = zip(
    *(
      finetune.make_finetune_step(_loss, optimizer, microbatches=count)(
        finetune.init_state(_variables(), optimizer), BATCH
      )
      for count in (1, 4)
    ),
    strict=True,
  )
  one, four = map(finetune.state_variables, states)
  for left, right in zip(*map(jax.tree.leaves, (one, four)), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics[0]["loss"], metrics[1]["loss"], rtol=1e-5)
  # What is not a mean of images would differ: the largest output of a part.
  assert float(jnp.abs(one["params"]["fc"]["bias"]).max()) > 1e-3


def test_training_lowers_the_loss_and_never_moves_codes():
  optimizer = finetune.cosine_adam(
    learning_rate=1e-2, final_learning_rate=1e-4, num_steps=200
  )
  step = finetune.make_finetune_step(_loss, optimizer)
  state = finetune.init_state(_variables(), optimizer)
  losses = []
  for _ in range(200):
    state, metrics = step(state, BATCH)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.8 * losses[0]
  assert int(state.step) == 200
  codes = finetune.state_variables(state)["params"]["fc"]["kernel"].codes
  np.testing.assert_array_equal(
    codes, _variables()["params"]["fc"]["kernel"].codes
  )


def test_the_optimizer_keeps_nothing_for_frozen_leaves():
  state = finetune.init_state(_variables(), optax.adam(1e-3))
  moments = jax.tree.leaves(state.opt_state[0].mu)
  assert sorted(leaf.shape for leaf in moments) == [(3,), (4, 2)]


def test_the_schedule_goes_from_the_first_rate_to_the_last():
  optimizer = finetune.cosine_adam(
    learning_rate=1e-3, final_learning_rate=1e-6, num_steps=10
  )
  # Adam's update of a constant gradient is the learning rate itself.
  state = optimizer.init(jnp.ones(1))
  rates = []
  for _ in range(11):
    update, state = optimizer.update(jnp.ones(1), state)
    rates.append(-float(update[0]))
  expected = 1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2
  np.testing.assert_allclose(rates, expected, rtol=1e-3)
