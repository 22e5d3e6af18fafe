import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from pqf_jax import errors, finetune
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


def _loss(variables, batch, key):
  del key
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


def test_the_average_of_the_weights_is_kept_beside_them():
  optimizer, decay = optax.sgd(0.1), 0.8
  plain = finetune.make_finetune_step(_loss, optimizer)
  averaging = finetune.make_finetune_step(_loss, optimizer, ema_decay=decay)
  state = finetune.init_state(_variables(), optimizer)
  averaged = finetune.init_state(_variables(), optimizer, averaged=True)
  average = jax.device_get(_variables())
  for step in range(1, 41):
    state, _ = plain(state, BATCH)
    averaged, _ = averaging(averaged, BATCH)
    kept = min(decay, step / (9 + step))
    average = jax.tree.map(
      lambda old, new, kept=kept: (
        kept * old + (1 - kept) * np.asarray(new)
        if np.issubdtype(old.dtype, np.floating)
        else old
      ),
      average,
      finetune.state_variables(state),
    )
  last = averaged._replace(average=None)
  for got, expected, rtol in (
    (finetune.state_variables(last), finetune.state_variables(state), 0),
    (finetune.state_variables(averaged), average, 1e-4),
  ):
    for left, right in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
      np.testing.assert_allclose(left, right, rtol=rtol, atol=1e-6 * (rtol > 0))


def test_an_average_keeps_what_is_frozen_to_the_bit():
  optimizer = optax.sgd(0.1)
  step = finetune.make_finetune_step(_loss, optimizer, ema_decay=0.9)
  frozen = ("params/fc/kernel/codebook",)
  state = finetune.init_state(_variables(), optimizer, frozen, averaged=True)
  for _ in range(5):
    state, _ = step(state, BATCH)
  kernels = [
    tree["params"]["fc"]["kernel"].codebook
    for tree in (finetune.state_variables(state), _variables())
  ]
  np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize("decay, averaged", [(0.9, False), (0.0, True)])
def test_a_step_and_its_state_agree_about_the_average(decay, averaged):
  optimizer = optax.sgd(0.1)
  step = finetune.make_finetune_step(_loss, optimizer, ema_decay=decay)
  state = finetune.init_state(_variables(), optimizer, averaged=averaged)
  with pytest.raises(errors.InputError, match=f"averaged={bool(decay)}"):
    step(state, BATCH)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_no_average_has_is_refused(decay):
  with pytest.raises(errors.InputError, match="ema_decay is .*; give 0 <="):
    finetune.make_finetune_step(_loss, optax.sgd(0.1), ema_decay=decay)


def test_a_step_leaves_the_variables_of_the_caller_alone():
  variables = _variables()
  optimizer = optax.adam(1e-2)
  step = finetune.make_finetune_step(_loss, optimizer)
  step(finetune.init_state(variables, optimizer), BATCH)
  for ours, fresh in zip(
    jax.tree.leaves(variables), jax.tree.leaves(_variables()), strict=True
  ):
    np.testing.assert_array_equal(ours, fresh)


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


def test_the_loss_gets_another_key_in_every_step_and_part():
  def loss(variables, batch, key):
    value, (updated, _) = _loss(variables, batch, key)
    drawn = jax.random.uniform(key)
    return value, (updated, {"mean": drawn, "square": jnp.square(drawn)})

  optimizer = optax.sgd(0.1)

  def draws(microbatches, seed=0):
    step = finetune.make_finetune_step(
      loss, optimizer, key=jax.random.key(seed), microbatches=microbatches
    )
    state = finetune.init_state(_variables(), optimizer)
    drawn = []
    for _ in range(3):
      state, metrics = step(state, BATCH)
      drawn.append((float(metrics["mean"]), float(metrics["square"])))
    return drawn

  one = draws(1)
  assert len(set(one)) == 3
  assert one == draws(1) and one != draws(1, seed=1)
  for mean, square in draws(4):
    assert square - mean**2 > 1e-4, "all parts drew the same"


def test_a_hook_after_the_update_may_replace_codes():
  optimizer = optax.sgd(0.1)

  def rotate(state):
    variables = finetune.state_variables(state)
    node = variables["params"]["fc"]["kernel"]
    moved = {"fc": {"kernel": node.replace(codes=(node.codes + 1) % 4)}}
    _, frozen = vq_array.split_trainable({"params": moved})
    codes = frozen["params"]["fc"]["kernel"]
    params = {"fc": {**state.frozen["params"]["fc"], "kernel": codes}}
    return state._replace(frozen={**state.frozen, "params": params})

  def after(hook):
    step = finetune.make_finetune_step(_loss, optimizer, after_update=hook)
    state = finetune.init_state(_variables(), optimizer)
    for _ in range(2):
      state, _ = step(state, BATCH)
    return finetune.state_variables(state)["params"]["fc"]["kernel"]

  plain, moved = after(None), after(rotate)
  np.testing.assert_array_equal(moved.codes, (plain.codes + 2) % 4)
  assert not np.allclose(moved.codebook, plain.codebook)


SETTINGS = {
  "name": "adam",
  "learning_rate": 1e-2,
  "final_learning_rate": 1e-4,
  "num_steps": 20,
}


def _updates(settings, num_steps, params):
  """Updates of a constant gradient of ones."""
  optimizer = finetune.make_optimizer(**settings)
  state, updates = optimizer.init(params), []
  for _ in range(num_steps):
    gradient = jax.tree.map(jnp.ones_like, params)
    update, state = optimizer.update(gradient, state, params)
    updates.append(jax.tree.map(np.asarray, update))
  return updates


def test_a_warm_up_rises_from_zero_to_the_rate():
  settings = SETTINGS | {"warmup_steps": 4}
  updates = _updates(settings, 6, jnp.ones(1))
  rates = [-float(update[0]) for update in updates]
  np.testing.assert_allclose(
    rates[:5], [0, 2.5e-3, 5e-3, 7.5e-3, 1e-2], rtol=1e-3, atol=1e-8
  )
  assert rates[5] < rates[4]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_spares_norms_and_biases(name):
  params = {"codebook": jnp.full((4, 2), 3.0), "bias": jnp.full(3, 3.0)}
  decayed, plain = (
    _updates(SETTINGS | {"name": name, "weight_decay": decay}, 1, params)[0]
    for decay in (0.5, 0.0)
  )
  np.testing.assert_allclose(decayed["bias"], plain["bias"])
  # The decay of a step is rate * decay * weight.
  np.testing.assert_allclose(
    decayed["codebook"] - plain["codebook"], -1e-2 * 0.5 * 3, rtol=1e-5
  )


def test_momentum_adds_up_the_gradients():
  settings = SETTINGS | {
    "name": "sgd",
    "momentum": 0.5,
    "final_learning_rate": 1e-2,
  }
  updates = _updates(settings, 3, jnp.ones(1))
  found = [-float(update[0]) for update in updates]
  np.testing.assert_allclose(found, [1e-2, 1.5e-2, 1.75e-2], rtol=1e-5)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"name": "lion"}, "'lion'; it must be one of"),
    ({"weight_decay": 0.1}, "'adam' has no weight_decay.*'adamw' or 'sgd'"),
    ({"name": "adamw", "momentum": 0.9}, "'adamw' has no momentum.*'sgd'"),
    ({"name": "sgd", "momentum": 1.0}, "momentum is 1;"),
    ({"name": "sgd", "weight_decay": -1.0}, "weight_decay is -1;"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"final_learning_rate": 1.0}, "final_learning_rate 1;"),
    ({"warmup_steps": 20}, "takes 20 of 20 steps"),
    ({"warmup_steps": -1}, "takes -1 of 20 steps"),
    ({"num_steps": 0}, "num_steps is 0;"),
  ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(changed, message):
  with pytest.raises(errors.InputError, match=message):
    finetune.make_optimizer(**SETTINGS | changed)


@pytest.mark.parametrize(
  ("variables", "frozen", "message"),
  [
    ({"params": {}, "stats": {"a": jnp.ones(2)}}, (), "of dict with stats/a;"),
    (FrozenDict(stats=jnp.ones(2, int)), (), "of FrozenDict with stats;"),
    ({"params": {"a": "text"}}, (), "leaf 'params/a', is of type str"),
    (jax.eval_shape(_variables), (), "of type ShapeDtypeStruct"),
    (_variables(), ("(",), r"frozen '\(' is not a regular expression"),
    (_variables(), (3,), "frozen 3 is not a regular expression"),
    (_variables(), ("params/.*",), "no leaf is trained"),
    (_variables(), ("params/fc/kernel",), "similar names: .'params/fc/kernel/"),
    (_variables(), "params/fc/bias", "frozen has 'p', which matches no"),
  ],
)
def test_a_state_in_which_nothing_learns_is_refused(variables, frozen, message):
  with pytest.raises(errors.InputError, match=message):
    finetune.init_state(variables, optax.sgd(0.1), frozen)


@pytest.mark.parametrize("count", [0, -1, 1.5, None])
def test_microbatches_are_counted(count):
  with pytest.raises(errors.InputError, match=f"microbatches is {count}; give"):
    finetune.make_finetune_step(_loss, optax.sgd(0.1), microbatches=count)


def test_rows_that_cannot_be_cut_into_microbatches_are_said():
  optimizer = optax.sgd(0.1)
  step = finetune.make_finetune_step(_loss, optimizer, microbatches=3)
  with pytest.raises(errors.InputError, match=r"has \[16\] rows .* give a div"):
    step(finetune.init_state(_variables(), optimizer), BATCH)


@pytest.mark.parametrize(
  ("updated", "message"),
  [
    ({"stats": {"a": jnp.ones(1)}}, "'stats' with other leaves.* .a.;"),
    ({"batch_stats": {"bn": {}}}, "'batch_stats' with other .* .bn/mean.;"),
  ],
)
def test_collections_of_another_structure_are_named(updated, message):
  def loss(*inputs):
    value, (_, metrics) = _loss(*inputs)
    return value, (updated, metrics)

  optimizer = optax.sgd(0.1)
  step = finetune.make_finetune_step(loss, optimizer)
  with pytest.raises(errors.InputError, match=message):
    step(finetune.init_state(_variables(), optimizer), BATCH)


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_what_is_slowed_down_takes_a_share_of_its_step(name, rate):
  make = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}[name]
  rng = np.random.default_rng(0)
  leaves = {
    f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    for i in range(2)
  }
  trainable = {"params": leaves | {"frozen": None}}
  slowed = finetune.slow_down(make, {"params/layer0/kernel"}, rate)
  states = make.init(trainable), slowed.init(trainable)
  for _ in range(3):
    gradients = jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
      trainable,
    )
    whole, first = make.update(gradients, states[0], trainable)
    part, second = slowed.update(gradients, states[1], trainable)
    states = first, second
    for layer, share in (("layer0", rate), ("layer1", 1.0)):
      np.testing.assert_allclose(
        part["params"][layer]["kernel"],
        np.float32(share) * whole["params"][layer]["kernel"],
        rtol=1e-6,
      )
