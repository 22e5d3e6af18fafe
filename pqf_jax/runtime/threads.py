"""Independent NumPy work on several cores, with results that do not vary."""

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
  most: int,
) -> None:
  """Runs each task in a thread; they begin in their order, longest first best.

  A task's matrix products stay in its own thread, on one core or on many: BLAS
  adds in another order for each number of threads, and a result should not
  depend on the machine's load or size. NumPy and SciPy let go of the
  interpreter lock in all that takes long.

  Args:
    tasks: {name: what to run}.
    on_done: (name, result), called in the calling thread as tasks end.
    most: tasks that may be in work at the same time.

  Raises:
    Whatever a task or `on_done` raises; tasks not begun are dropped.
  """
  pool = futures.ThreadPoolExecutor(min(most, os.cpu_count() or 1))
  with threadpoolctl.threadpool_limits(1, "blas"):
    try:
      running = {pool.submit(task): name for name, task in tasks.items()}
      for done in futures.as_completed(running):
        on_done(running[done], done.result())
    finally:
      pool.shutdown(cancel_futures=True)
