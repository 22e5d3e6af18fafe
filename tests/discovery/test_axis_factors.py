"""The union-find of axis factors."""

import itertools
import math
from typing import Any

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


def add(*terms: list[int]) -> axis_factors.Axis:
  return axis_factors.add_axes(map(make_axis, terms))


def test_sums_are_cut_wherever_either_side_ends():
  left, right = add([3], [5]), add([4], [4])
  axis_factors.tie_axes(left, right)
  segments = axis_factors.find_segments(left)
  assert [[factor.size for factor in part] for part in segments] == [
    [3],
    [],
    [4],
  ]
  assert segments == axis_factors.find_segments(right)


def test_a_sum_cuts_the_major_factor_of_a_product():
  left, right = add([4], [8]), make_axis([6, 2])
  axis_factors.tie_axes(left, right)
  segments = axis_factors.find_segments(right)
  sizes = [[factor.size for factor in part] for part in segments]
  assert sizes == [[2, 2], [4, 2]]
  assert segments == axis_factors.find_segments(left)
  assert segments[0][1] is segments[1][1]
  assert not any(factor.blocked_by for part in segments for factor in part)


def test_only_the_segments_that_do_not_fit_are_blocked():
  left, right = add([2], [5], [7], [3]), add([2], [4, 3], [3])
  axis_factors.tie_axes(left, right)
  for side in left, right:
    segments = axis_factors.find_segments(side)
    assert not segments[0][0].blocked_by
    assert not segments[-1][0].blocked_by
    for part in segments[1:-1]:
      assert all(f.blocked_by == {axis_factors.MISFIT} for f in part)


PRODUCTS = st.lists(st.sampled_from([2, 3, 4]), max_size=2)
SUMS_OF_PRODUCTS = st.lists(PRODUCTS, min_size=1, max_size=4)


@hypothesis.given(st.lists(SUMS_OF_PRODUCTS, min_size=2, max_size=6))
@hypothesis.settings(deadline=None, max_examples=100)
def test_both_sides_have_the_same_segments_or_are_blocked(sums):
  """Also where one factor is in both sides, or twice in one."""
  pool = [axis_factors.new_axis(size) for size in (2, 3, 4)]
  longest = max(sum(map(math.prod, terms)) for terms in sums)
  axes = []
  for terms in sums:
    parts = [sum((pool[size - 2] for size in term), ()) for term in terms]
    rest = longest - sum(map(math.prod, terms))
    axes.append(axis_factors.add_axes([*parts, axis_factors.new_axis(rest)]))
  for one, other in itertools.pairwise(axes):
    axis_factors.tie_axes(one, other)
  for one, other in itertools.pairwise(axes):
    assert free_places(one) == free_places(other)


def free_places(axis: axis_factors.Axis) -> list[tuple[int, int, Any]]:
  """Every free factor of an axis: (start of its segment, stride, factor)."""
  places, start = [], 0
  for segment in axis_factors.find_segments(axis):
    stride = axis_factors.axis_length(segment)
    for factor in segment:
      stride //= factor.size
      if factor.terms:
        places += [
          (start + place, stride * inner, free)
          for place, inner, free in free_places((factor,))
        ]
      elif not factor.blocked_by:
        places.append((start, stride, factor))
    start += axis_factors.axis_length(segment)
  return places


def test_a_long_chain_of_cuts_and_ties_is_no_recursion():
  first = axis = axis_factors.new_axis(1200)
  for length in range(1199, 0, -1):
    rest = axis_factors.new_axis(length)
    one = axis_factors.new_axis(1)
    axis_factors.tie_axes(axis, axis_factors.add_axes([one, rest]))
    axis = rest
  assert len(axis_factors.find_segments(first)) == 1200
  axis_factors.block_axes([first], "why")


FACTORIZATIONS = ([24], [2, 12], [4, 6], [12, 2], [2, 2, 6], [8, 3], [24])
SUMS = ([24], [12, 12], [6, 18], [5, 19], [8, 8, 8], [24], [4, 20])
NODES = st.integers(0, len(FACTORIZATIONS) - 1)
FACTS = st.one_of(st.tuples(NODES, NODES), st.tuples(NODES))


def state_facts(
  axes: list[axis_factors.Axis], facts: list[tuple[int, ...]]
) -> list[list[tuple[int, ...]]]:
  """Ties or blocks axes of length 24; (size, class) of their free factors."""
  for chosen in facts:
    if len(chosen) == 2:
      axis_factors.tie_axes(axes[chosen[0]], axes[chosen[1]])
    else:
      axis_factors.block_axes([axes[chosen[0]]], "why")
  classes: dict[axis_factors.Factor, int] = {}
  return [
    [
      (factor.size, classes.setdefault(factor, len(classes)))
      for segment in axis_factors.find_segments(axis)
      for factor in segment
      if not factor.blocked_by
    ]
    for axis in axes
  ]


@hypothesis.given(st.data(), st.lists(FACTS, max_size=7), st.booleans())
def test_the_order_of_the_facts_does_not_matter(data, facts, sums):
  def axes() -> list[axis_factors.Axis]:
    if sums:
      return [add(*([size] for size in sizes)) for sizes in SUMS]
    return list(map(make_axis, FACTORIZATIONS))

  shuffled = data.draw(st.permutations(facts))
  assert state_facts(axes(), shuffled) == state_facts(axes(), facts)
