"""Threads: all tasks run, BLAS uses one thread, errors reach the caller."""

import threading
from concurrent import futures

import numpy as np
import pytest
import threadpoolctl

from pqf_jax.runtime import threads


def _blas_threads():
  libraries = threadpoolctl.threadpool_info()
  return {
    library["num_threads"]
    for library in libraries
    if library["user_api"] == "blas"
  }


def test_every_result_is_handed_to_the_calling_thread():
  before = _blas_threads()
  product = np.ones((300, 300)) @ np.ones((300, 300))
  done, callers = {}, set()

  def task(number):
    return lambda: (number, (product @ product).sum(), _blas_threads())

  def on_done(name, result):
    callers.add(threading.get_ident())
    done[name] = result

  threads.run_tasks({str(n): task(n) for n in range(9)}, on_done, max_threads=3)
  assert callers == {threading.get_ident()}
  assert {name: result[0] for name, result in done.items()} == {
    str(n): n for n in range(9)
  }
  assert len({result[1] for result in done.values()}) == 1
  assert set().union(*(result[2] for result in done.values())) == {1}
  assert _blas_threads() == before


def test_the_first_error_drops_tasks_that_have_not_begun(monkeypatch):
  begun = []
  dropped = threading.Event()

  class Pool(futures.ThreadPoolExecutor):
    def shutdown(self, wait=True, *, cancel_futures=False):
      super().shutdown(wait=False, cancel_futures=cancel_futures)
      dropped.set()
      super().shutdown(wait=wait)

  def fail():
    raise ZeroDivisionError("task 0")

  def task():
    begun.append(True)
    dropped.wait()

  monkeypatch.setattr(threads.futures, "ThreadPoolExecutor", Pool)
  tasks = {"0": fail} | {str(n): task for n in range(1, 50)}
  before = _blas_threads()
  with pytest.raises(ZeroDivisionError, match="task 0"):
    threads.run_tasks(tasks, lambda name, result: None, max_threads=1)
  assert _blas_threads() == before
  assert len(begun) <= 1


def test_no_more_than_max_threads_run_at_the_same_time():
  lock = threading.Lock()
  active, peak = 0, 0

  def task():
    nonlocal active, peak
    with lock:
      active += 1
      peak = max(peak, active)
    np.linalg.inv(np.eye(200) + 1)
    with lock:
      active -= 1

  tasks = {str(n): task for n in range(20)}
  threads.run_tasks(tasks, lambda name, result: None, max_threads=2)
  assert 1 <= peak <= 2
