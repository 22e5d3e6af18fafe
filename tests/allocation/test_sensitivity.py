"""The change of outputs by an error of one kernel."""

import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.allocation import sensitivity

RNG = np.random.default_rng(0)
VARIABLES = {
  name: jnp.asarray(RNG.normal(size=(48, 48)), jnp.float32)
  for name in ("first", "second", "unread", "tenth")
}
BATCHES = [
  (jnp.asarray(RNG.normal(size=(64, 48)), jnp.float32),) for _ in range(2)
]


def apply_fn(v, x):
  return {"y": x @ v["first"] @ v["second"] + 0.1 * x @ v["tenth"], "n": 3}


@pytest.fixture(scope="module")
def changes():
  return sensitivity.output_changes(apply_fn, VARIABLES, VARIABLES, BATCHES)


def test_of_a_chain_each_kernel_counts_as_much_as_its_error(changes):
  # |sqrt(1 - d) w + sqrt(d) e - w|^2 over |w|^2, over d / (1 - d).
  d = sensitivity._TRIED
  wanted = (2 - 2 * np.sqrt(1 - d)) / d * (1 - d)
  assert changes["first"] == pytest.approx(wanted, rel=0.15)
  assert changes["second"] == pytest.approx(wanted, rel=0.15)


def test_a_kernel_counts_by_its_share_of_the_outputs(changes):
  assert changes["unread"] == 0
  share = changes["tenth"] / changes["first"]
  assert share == pytest.approx(0.1**2 / 48, rel=0.2)


def test_the_scale_of_kernels_and_outputs_does_not_matter(changes):
  scaled = {**VARIABLES, "second": 1000 * VARIABLES["second"]}
  found = sensitivity.output_changes(
    lambda v, x: x @ v["first"] @ v["second"], scaled, ["first"], BATCHES
  )
  assert found["first"] == pytest.approx(changes["first"], rel=0.05)


def test_outputs_that_are_not_finite_are_refused():
  with pytest.raises(errors.InputError, match="outputs .* NaN or infinite"):
    sensitivity.output_changes(
      lambda v, x: jnp.log(-jnp.abs(x @ v["first"])),
      VARIABLES,
      ["first"],
      BATCHES,
    )


def test_outputs_that_an_error_makes_infinite_are_refused():
  identity = {"w": jnp.eye(48, dtype=jnp.float32)}
  x = (jnp.ones((4, 48), jnp.float32),)
  with pytest.raises(errors.InputError, match="infinite when w has an error"):
    sensitivity.output_changes(
      lambda v, x: jnp.log(0.1 - jnp.abs(x @ v["w"] - 1)), identity, ["w"], [x]
    )
