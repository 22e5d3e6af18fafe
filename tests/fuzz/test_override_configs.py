"""Settings that make no sense are refused, before anything is done."""

import os
import subprocess
import sys

import pytest

from pqf_jax import errors
from tests.fuzz import override_configs


@pytest.mark.parametrize("key", override_configs.KEYS)
def test_values_that_can_never_be_right_are_refused_at_once(key, monkeypatch):
  monkeypatch.chdir(override_configs.ROOT)
  accepted = []
  for case in override_configs.cases():
    if case.key == key:
      try:
        override_configs.check(case)
      except errors.InputError as error:
        assert not override_configs.is_accepted(case), error
      else:
        accepted.append(case)
  if key not in override_configs.NEED_MORE:
    wrong = [c for c in accepted if not override_configs.is_accepted(c)]
    assert not wrong


@pytest.mark.slow
def test_the_command_refuses_the_rest_with_one_line_and_no_workdir():
  done = subprocess.run(
    [sys.executable, "-m", "tests.fuzz.override_configs"],
    cwd=override_configs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
