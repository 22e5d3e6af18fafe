"""The union-find of axis factors."""

import math

import hypothesis
from hypothesis import strategies as st

from pqf_jax.discovery import axis_factors

SIZES = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3)


def make_axis(sizes: list[int]) -> axis_factors.Axis:
  return sum(map(axis_factors.new_axis, sizes), ())


@hypothesis.given(SIZES, SIZES)
def test_tied_axes_have_one_factorization_or_are_blocked(first, second):
  second = second + [1, math.prod(first)]
  first = first + [math.prod(second[:-1])]
  left, right = make_axis(first), make_axis(second)
  axis_factors.tie_axes(left, right)
  factors = axis_factors.find_factors(left)
  assert math.prod(factor.size for factor in factors) == math.prod(first)
  if factors != axis_factors.find_factors(right):
    assert all(factor.blocked_by for factor in factors)


def test_a_common_refinement_is_found():
  left, right = make_axis([4, 6]), make_axis([2, 6, 2])
  axis_factors.tie_axes(left, right)
  factors = axis_factors.find_factors(left)
  assert [factor.size for factor in factors] == [2, 2, 3, 2]
  assert factors == axis_factors.find_factors(right)
  assert not any(factor.blocked_by for factor in factors)


def test_factors_without_a_common_refinement_are_blocked():
  left, right = make_axis([6, 4]), make_axis([8, 3])
  axis_factors.tie_axes(left, right)
  assert all(factor.blocked_by for factor in axis_factors.find_factors(left))
  assert all(factor.blocked_by for factor in axis_factors.find_factors(right))


FACTORIZATIONS = ([24], [2, 12], [4, 6], [12, 2], [2, 2, 6], [8, 3], [24])
NODES = st.integers(0, len(FACTORIZATIONS) - 1)
FACTS = st.one_of(st.tuples(NODES, NODES), st.tuples(NODES))


def state_facts(facts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
  """Ties or blocks axes of length 24; (size, class) of their free factors."""
  axes = list(map(make_axis, FACTORIZATIONS))
  for chosen in facts:
    if len(chosen) == 2:
      axis_factors.tie_axes(axes[chosen[0]], axes[chosen[1]])
    else:
      axis_factors.block_axes([axes[chosen[0]]], "why")
  classes: dict[axis_factors.Factor, int] = {}
  return [
    [
      (factor.size, classes.setdefault(factor, len(classes)))
      for factor in axis_factors.find_factors(axis)
      if not factor.blocked_by
    ]
    for axis in axes
  ]


@hypothesis.given(st.data(), st.lists(FACTS, max_size=7))
def test_the_order_of_the_facts_does_not_matter(data, facts):
  shuffled = data.draw(st.permutations(facts))
  assert state_facts(shuffled) == state_facts(facts)
