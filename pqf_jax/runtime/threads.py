"""Runs independent NumPy work on several cores, with reproducible results."""

import os
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import TypeVar

import threadpoolctl

T = TypeVar("T")


def run_tasks(
  tasks: Mapping[str, Callable[[], T]],
  on_done: Callable[[str, T], None],
  *,
  max_threads: int,
) -> None:
  """Runs each task in a thread; tasks begin in order, so put long ones first.

  BLAS uses one thread meanwhile, on any machine: it adds in another order for
  each number of threads, and a result should not depend on the number of cores.
  NumPy and SciPy release the interpreter lock in long calls.

  Args:
    tasks: {name: function}.
    on_done: (name, result), called in the calling thread as tasks end.
    max_threads: tasks that may run at the same time.

  Raises:
    Exception: any that a task or `on_done` raises; tasks that have not begun
      are dropped.
  """
  pool = futures.ThreadPoolExecutor(min(max_threads, os.cpu_count() or 1))
  with threadpoolctl.threadpool_limits(1, "blas"):
    try:
      running = {pool.submit(task): name for name, task in tasks.items()}
      for done in futures.as_completed(running):
        on_done(running[done], done.result())
    finally:
      pool.shutdown(cancel_futures=True)
