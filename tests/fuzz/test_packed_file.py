"""A few hundred changed files; a million by hand, see `fuzz_packed_file`."""

import collections

from tests.fuzz import fuzz_packed_file as fuzz


def test_changed_files_are_refused_or_the_same():
  outcomes, failures = fuzz.run(count=600, seed=1)
  assert not [failure[:2] for failure in failures]
  # Both the guarded path and the one behind it were tried.
  assert outcomes["flip_bits", "refused"] > 20
  assert (
    outcomes["edit_header", "whole"] + outcomes["edit_buffers", "whole"] > 9
  )


def test_every_single_bit_is_guarded():
  data = fuzz.seeds()[0]
  outcomes = collections.Counter(outcome for _, outcome in fuzz.flips(data))
  assert outcomes.keys() <= {"refused", "same"}
  assert outcomes["refused"] > 0.99 * 8 * len(data)


def test_of_format_2_all_but_the_header_is_guarded():
  data = fuzz.seeds()[-1]
  text = range(data.index(b'"{') + 1, data.index(b'}"},"') + 1)
  open_places = set()
  for place, outcome in fuzz.flips(data):
    assert outcome in ("refused", "same", "unprotected")
    if outcome == "unprotected":
      open_places.add(place)
  assert open_places <= set(text)
