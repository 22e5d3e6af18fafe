"""Sharded kernels give what whole ones give, and stay sharded."""

import json
import sys

import pytest

from tests import host_devices

NUM_DEVICES = 4


@pytest.fixture(scope="module")
def found():
  """What `main` prints in a process that has the devices."""
  return host_devices.run("tests.test_sharded", NUM_DEVICES)


def test_devices_that_take_a_batch_each_change_no_bit(found):
  assert found["num_devices"] == NUM_DEVICES
  assert found["differ_on_two"] == []
  assert found["differ_on_all"] == []


def test_batches_of_equal_shapes_ran_at_the_same_time(found):
  # Five equal batches and one other.
  assert sorted(found["rounds_on_two"]) == [1, 1, 2, 2]
  assert sorted(found["rounds_on_all"]) == [1, 1, 4]


def test_no_more_programs_are_compiled_for_four_devices_than_for_two(found):
  assert 0 < found["programs_on_all"] <= found["programs_on_two"]


def test_a_layer_with_an_outlier_is_quantized_as_if_alone(found):
  assert found["differ_with_outlier"] == []


def test_sharded_kernels_are_compressed_alike(found):
  assert found["differ_sharded"] == []
  assert found["groups_sharded"] == found["groups_whole"] > 0


def test_nothing_of_sharded_kernels_stays_on_the_host(found):
  assert found["on_host"] == []


def test_no_device_gathers_a_leaf_to_reorder_it(found):
  assert found["differ_reordered"] == []
  share = 4 * 32 * 64 // NUM_DEVICES
  for stack, tail in (([], ""), ([1], ", an order a layer")):
    for case in ("whole axis", "cut axis"):
      assert found["reordered"][case + tail] == [*stack, 1, NUM_DEVICES]
    assert found["exchanged"]["whole axis" + tail] == []
    assert max(found["exchanged"]["cut axis" + tail]) == share


def test_a_stack_is_reordered_in_its_place_layer_by_layer(found):
  assert found["moved"] == [[1, 1, NUM_DEVICES], True, True]
  layer = 4 * 32 * 64 // NUM_DEVICES
  assert found["in_place"] < 8 * layer  # that is all of the stack's share


def test_every_leaf_stays_where_it_was(found):
  places = found["places"]
  # Into how many parts each axis is cut: that of C_out, whichever was.
  assert places["up/kernel/codes"] == [NUM_DEVICES, 1]
  assert places["down/kernel/codes"] == [NUM_DEVICES, 1]
  assert places["up/kernel/codebook"] == [1, 1]
  assert places["up/bias"] == [NUM_DEVICES]
  assert places["down/bias"] == [1]


def test_a_training_step_keeps_codes_and_codebooks_in_place(found):
  for leaf in ("codes", "codebook"):
    for kernel in ("up/kernel", "down/kernel"):
      place = f"{kernel}/{leaf}"
      assert found["places_after_step"][place] == found["places"][place]
  assert found["loss_sharded"] == pytest.approx(found["loss_whole"], rel=1e-5)
  assert found["step_moved"] > 1e-4
  assert found["step_difference"] < 1e-5


def test_calibration_takes_sharded_leaves(found):
  assert found["calibrated_sharded"] == pytest.approx(
    found["calibrated_whole"], rel=1e-3
  )
  assert found["places_calibrated"] == found["places"]


def main() -> None:
  """Compresses the same networks on one device and on several."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from jax import monitoring
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  import pqf_jax
  from pqf_jax import finetune, permute, quantize
  from pqf_jax.core import plan as plans
  from pqf_jax.core import spread, trees
  from pqf_jax.discovery import discover
  from pqf_jax.preflight import costs

  draw = np.random.default_rng(0)

  def kernel(*shape):
    return draw.normal(size=shape).astype(np.float32)

  def differ(left, right):
    left, right = map(trees.flatten, (left, right))
    return [
      path
      for path in left
      if not np.array_equal(np.asarray(left[path]), np.asarray(right[path]))
    ]

  # Each kernel is a batch.
  quantize._MOST_WEIGHTS, quantize._MOST_OF_SPREAD = 32 * 32, 32 * 64
  compiled, rounds = [], []
  monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
      compiled.append(event)
      if event.endswith("backend_compile_duration")
      else 0
    )
  )
  run_round = quantize._quantize

  def spy(*arguments):
    rounds.append(len(arguments[-1].batches))
    return run_round(*arguments)

  quantize._quantize = spy
  layers = {f"layer{i}": {"kernel": kernel(32, 32)} for i in range(5)}
  layers["other"] = {"kernel": kernel(16, 32)}
  plan = plans.make_plan([plans.Rule(".*", 16, 4, 20)], layers)
  found = {"num_devices": jax.device_count()}

  def on(count):
    compiled.clear()
    rounds.clear()
    mesh = Mesh(np.array(jax.devices()[:count]), ("devices",))
    result, _ = quantize.quantize_params(
      jax.random.key(0), layers, plan, mesh=mesh
    )
    return result, len(compiled), list(rounds)

  alone, _, _ = on(1)
  for name, count in (("two", 2), ("all", NUM_DEVICES)):
    result, programs, sizes = on(count)
    found |= {
      f"differ_on_{name}": differ(alone, result),
      f"programs_on_{name}": programs,
      f"rounds_on_{name}": sizes,
    }
  layers["layer1"]["kernel"][3, 7:11] = 1e5
  found["differ_with_outlier"] = differ(on(1)[0], on(NUM_DEVICES)[0])

  network = {
    "up": {"kernel": kernel(32, 64), "bias": kernel(64)},
    "down": {"kernel": kernel(64, 32), "bias": kernel(32)},
  }
  cuts = {
    "up": {"kernel": (None, "model"), "bias": ("model",)},
    "down": {"kernel": ("model", None), "bias": ()},
  }
  mesh = Mesh(np.array(jax.devices()), ("model",))

  def place():
    return jax.tree.map(
      lambda leaf, cut: jax.device_put(
        leaf, NamedSharding(mesh, PartitionSpec(*cut))
      ),
      network,
      cuts,
    )

  sharded = place()

  def apply(variables, x):
    hidden = x @ variables["up"]["kernel"][...] + variables["up"]["bias"]
    hidden = jax.nn.relu(hidden)
    return hidden @ variables["down"]["kernel"][...] + variables["down"]["bias"]

  inputs, wanted = kernel(16, 32), kernel(16, 32)
  rules = [plans.Rule(".*kernel", 16, 4, 20)]

  def compress(variables, calibration=()):
    return pqf_jax.compress(
      apply,
      variables,
      inputs[:2],
      rules,
      key=jax.random.key(0),
      calibration=calibration,
    )

  def places(variables):
    return {
      path: np.floor_divide(leaf.shape, leaf.addressable_data(0).shape).tolist()
      for path, leaf in trees.flatten(variables).items()
    }

  whole, cut = compress(network), compress(sharded)
  found |= {
    "differ_sharded": differ(whole.variables, cut.variables),
    "groups_whole": sum(group.accepted for group in whole.groups),
    "groups_sharded": sum(group.accepted for group in cut.groups),
    "places": places(cut.variables),
  }

  fresh = place()
  axes = discover.discover_channels(apply, network, inputs[:2])
  plan = plans.make_plan(rules, network)
  permuted, _, _ = permute.permute_channels(
    jax.random.key(0), fresh, axes, plan
  )
  quantize.quantize_params(jax.random.key(0), permuted, plan)
  # Where `np.asarray` keeps what it has made of an array.
  found["on_host"] = [
    path
    for tree in (fresh, permuted)
    for path, leaf in trees.flatten(tree).items()
    if leaf._npy_value is not None
  ]
  leaf = fresh["up"]["kernel"]
  stack = jax.device_put(
    draw.normal(size=(8, *leaf.shape)).astype(np.float32),
    NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec)),
  )
  orders = np.stack([draw.permutation(32) for _ in stack])
  wide = np.concatenate([orders, orders + 32], 1)
  found |= {"differ_reordered": [], "reordered": {}, "exchanged": {}}
  cases = {
    "whole axis": (leaf, orders[0], 0),
    "cut axis": (leaf, wide[0], 1),
    "whole axis, an order a layer": (stack, orders[:, :, None], 1),
    "cut axis, an order a layer": (stack, wide[:, None], 2),
  }
  for case, (array, order, axis) in cases.items():
    take = np.take if order.ndim == 1 else np.take_along_axis
    taken = spread.take(array, order, axis)
    if not np.array_equal(taken, take(np.asarray(array), order, axis)):
      found["differ_reordered"].append(case)
    found["reordered"][case] = places({"": taken})[""]
    program = spread._take.lower(array, order, axis, array.sharding).compile()
    found["exchanged"][case] = [
      one.num_bytes for one in costs.find_collectives(program.as_text())
    ]

  in_place = spread._take_in_place.lower(stack, wide[0], 2, stack.sharding)
  reordered = np.asarray(stack).take(wide[0], 2)
  moved = spread.take(stack, wide[0], 2, donate=True)
  found["in_place"] = in_place.compile().memory_analysis().temp_size_in_bytes
  found["moved"] = [
    places({"": moved})[""],
    stack.is_deleted(),
    np.array_equal(moved, reordered),
  ]

  def loss_fn(variables, batch, key):
    del key
    error = jnp.square(apply(variables, batch["x"]) - batch["y"]).mean()
    return error, ({}, {})

  after = {}
  for name, variables in ("whole", whole.variables), ("sharded", cut.variables):
    optimizer = optax.adam(1e-2)
    state = finetune.init_state(variables, optimizer)
    step = finetune.make_finetune_step(loss_fn, optimizer)
    state, metrics = step(state, {"x": inputs, "y": wanted})
    found[f"loss_{name}"] = float(metrics["loss"])
    after[name] = finetune.state_variables(state)

  def distance(left, right):
    return max(
      float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())
      for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True)
    )

  calibrated = {
    name: compress(variables, [inputs])
    for name, variables in (("whole", network), ("sharded", sharded))
  }
  found |= {
    "places_after_step": places(after["sharded"]),
    "step_moved": distance(after["whole"], whole.variables),
    "step_difference": distance(after["whole"], after["sharded"]),
    "places_calibrated": places(calibrated["sharded"].variables),
  } | {
    f"calibrated_{name}": result.outputs["up/kernel"].after
    for name, result in calibrated.items()
  }
  sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
  main()
