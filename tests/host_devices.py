"""Processes of this host that have several devices, or make up one job."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

from tests.models import quick

ROOT = pathlib.Path(__file__).parents[1]


def run(module: str, num_devices: int, **environment: str) -> Any:
  """Returns what a module prints last, as JSON.

  Args:
    module: such as `tests.test_sharded`.
    num_devices: of the CPU.
    environment: further variables of the process.
  """
  done = subprocess.run(
    [sys.executable, "-m", module],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{quick.flags()} "
      f"--xla_force_host_platform_device_count={num_devices}",
    }
    | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def job(num_processes: int) -> list[dict[str, str]]:
  """Returns the variables that make so many processes one job, for each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    {
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(num_processes),
      "JAX_PROCESS_ID": str(index),
    }
    for index in range(num_processes)
  ]
