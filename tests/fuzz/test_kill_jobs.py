"""Two kills of a whole job; many more by hand, see `kill_jobs`."""

import pytest

from tests.fuzz import kill_jobs


@pytest.mark.slow
def test_a_job_that_is_killed_ends_with_the_same_bytes(tmp_path):
  assert len(list(kill_jobs.kills(tmp_path, count=2, seed=1))) == 2
