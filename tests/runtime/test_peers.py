"""Processes that end together, without a network or a job."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from pqf_jax.runtime import peers
from tests import host_devices

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 3
# Once all are ready; JAX by itself takes 100 s or 300 s.
SECONDS = 20
PROCESS = """
import pathlib, sys, time
import jax
from pqf_jax import errors
from pqf_jax.runtime import distributed, peers
distributed.start("on", timeout_seconds=60)
index = jax.process_index()
exec(sys.argv[3])
try:
  with peers.end_together():
    pathlib.Path(sys.argv[1], str(index)).touch()
    exec(sys.argv[2])
except errors.InputError as error:
  print(f"error: {error}")
  sys.exit(2)
except errors.Preempted:
  sys.exit(143)
"""
WAIT = "distributed.barrier('never reached by all')"


def _run(folder, action, disturb=lambda processes: None, before=""):
  """Runs the action in all processes; returns statuses and what they tell."""
  shared = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, str(folder), action, before],
      env=shared | own,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for own in host_devices.job(COUNT)
  ]
  deadline = time.monotonic() + 120
  while len(list(folder.iterdir())) < COUNT:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  disturb(processes)
  told = [process.communicate(timeout=SECONDS)[0] for process in processes]
  return [process.returncode for process in processes], told


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_all_others(tmp_path, victim):
  # The victim sleeps: that a collective fails is not what tells the others.
  codes, told = _run(
    tmp_path,
    f"time.sleep(600) if index == {victim} else {WAIT}",
    lambda processes: processes[victim].kill(),
  )
  for index in {*range(COUNT)} - {victim}:
    assert codes[index] not in (0, 2)
    assert f"error: process {victim + 1} of {COUNT} on " in told[index]
    assert told[index].count("was killed") == 1
  assert codes[victim] == -signal.SIGKILL


@pytest.mark.parametrize("who", [0, 2])
def test_what_one_raises_all_tell(tmp_path, who):
  text = "the disk of this host is full"
  raising = f"raise errors.InputError('{text}')"
  codes, told = _run(tmp_path, f"if index == {who}: {raising}\n{WAIT}")
  assert codes == [2] * COUNT
  for index, lines in enumerate(told):
    name = "" if index == who else rf"process {who + 1} of {COUNT} on "
    assert f"error: {name}" in lines and lines.count(text) == 1
    assert "Traceback" not in lines


def test_a_defect_of_one_keeps_its_traceback_and_ends_all(tmp_path):
  codes, told = _run(tmp_path, f"if index == 1: 1 / 0\n{WAIT}")
  assert codes == [1] * COUNT
  assert "Traceback" in told[1]
  for lines in (told[0], told[2]):
    assert "process 2 of 3 on " in lines and "ZeroDivisionError" in lines


def test_a_stopped_process_only_costs_time(tmp_path):
  def stop(processes):
    processes[0].send_signal(signal.SIGSTOP)
    time.sleep(3)
    assert all(process.poll() is None for process in processes)
    processes[0].send_signal(signal.SIGCONT)

  codes, _ = _run(tmp_path, "time.sleep(1); distributed.barrier('a')", stop)
  assert codes == [0] * COUNT


@pytest.mark.parametrize(
  ("action", "code"), [("pass", 0), ("raise errors.Preempted()", 143)]
)
def test_processes_may_end_one_after_the_other(tmp_path, action, code):
  codes, told = _run(tmp_path, f"time.sleep(index)\n{action}")
  assert codes == [code] * COUNT and "error" not in "".join(told)


def test_a_process_that_cannot_connect_works_on(tmp_path):
  refusing = (
    "def refuse(*args): raise ConnectionRefusedError\n"
    "if index == 2: peers.socket.create_connection = refuse"
  )
  codes, told = _run(tmp_path, "distributed.barrier('a')", before=refusing)
  assert codes == [0] * COUNT
  assert "process(es) 2 cannot reach process 0 at 127.0.0.1:" in told[0]


def test_strangers_are_dropped():
  with socket.create_server(("127.0.0.1", 0)) as listener:
    links = []
    for hello in (b"\xff\xfe 1\n", b"caf\xc3\xa9 1\n", b"\n", b"right 2\n"):
      links.append(socket.create_connection(listener.getsockname()))
      links[-1].sendall(hello)
    found = peers._accept(listener, "right", 1)
    assert found.keys() == {2}
    links[-1].sendall(b"more")
    assert found[2].recv(9) == b"more"
    for link in (*links, *found.values()):
      link.close()
