"""The choice under a budget, against all choices."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax.allocation import knapsack

ITEM = st.lists(
  st.tuples(st.integers(1, 40), st.integers(0, 50)), min_size=1, max_size=5
)


def totals(sizes, losses, picked):
  size = sum(int(s[i]) for s, i in zip(sizes, picked, strict=True))
  return size, sum(float(x[i]) for x, i in zip(losses, picked, strict=True))


@hypothesis.given(st.lists(ITEM, min_size=1, max_size=4), st.integers(0, 160))
@hypothesis.settings(deadline=None, max_examples=60)
def test_picks_the_best_of_all_choices(items, budget):
  sizes = [np.array([size for size, _ in item]) for item in items]
  losses = [np.array([loss for _, loss in item], float) for item in items]
  every = [
    totals(sizes, losses, picked)
    for picked in itertools.product(*(range(len(item)) for item in items))
  ]
  budget += min(size for size, _ in every)
  within = [loss for size, loss in every if size <= budget]
  picked = knapsack.pick_least_loss(sizes, losses, budget)
  size, loss = totals(sizes, losses, picked)
  assert size <= budget
  assert loss == pytest.approx(min(within))


def test_units_waste_little_and_more_is_never_worse(
  monkeypatch: pytest.MonkeyPatch,
):
  rng = np.random.default_rng(0)
  sizes = [np.sort(rng.integers(10**3, 10**6, 12)) for _ in range(8)]
  losses = [np.sort(rng.random(12))[::-1] for _ in sizes]
  budgets = np.linspace(sum(s.min() for s in sizes), 5 * 10**6, 9).astype(int)

  def least(budget: int) -> float:
    picked = knapsack.pick_least_loss(sizes, losses, budget)
    size, loss = totals(sizes, losses, picked)
    assert size <= budget
    return loss

  fine = [least(budget) for budget in budgets]
  monkeypatch.setattr(knapsack, "_UNITS", 1 << 9)
  coarse = [least(budget) for budget in budgets]
  assert (np.diff(fine) <= 1e-12).all()
  assert (np.diff(coarse) <= 1e-12).all()
  assert (np.array(fine) <= np.array(coarse) + 1e-12).all()
