"""Ends all processes of a job when one of them fails or disappears.

By itself JAX lets the others wait: for 100 s without heartbeats of a process
that was killed, for 300 s at the exit of one that failed, and then each aborts
with a stack trace. Here every process holds a connection to process 0. What a
failing process says is sent to all of them, and a connection that closes tells
of a process that was killed. One that is slow, or stopped, keeps it.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from pqf_jax import errors
from pqf_jax.runtime import distributed, progress

# To connect to process 0, and for it to find a connection.
CONNECT_SECONDS = 10.0
# Until a collective that fails with a process tells less than its connection.
ECHO_SECONDS = 2.0
LONGEST_LINE = 1 << 16


class Failure(NamedTuple):
  """Why a process ended, and the exit status of all."""

  process: int
  text: str
  status: int


@contextlib.contextmanager
def end_together() -> Iterator[None]:
  """Ends every process of the job when one raises, or ends, in this block.

  The one that raises goes on raising. All others print one line that names it
  and exit at once: with status 2 for bad input and what the system refuses, as
  a full disk, else with 1. All processes must enter the block.
  """
  if jax.process_count() == 1:
    yield
    return
  peers = _Peers(*_connect())
  try:
    yield
  except errors.Preempted:  # on all of them, at the same step
    peers.leave()
    raise
  except BaseException as error:
    peers.fail(error)
    raise
  peers.leave()


class _Peers:
  """The connections of this process: of process 0 to all, or that to it."""

  def __init__(
    self, hosts: Sequence[str], links: Mapping[int, socket.socket]
  ) -> None:
    """Listens to them in threads.

    Args:
      hosts: name of each process's host.
      links: {process: connection}.
    """
    self._hosts, self._links = hosts, links
    self._is_over = False
    self._lock = threading.Lock()
    for process, link in links.items():
      threading.Thread(
        target=self._listen, args=(process, link), daemon=True
      ).start()

  def leave(self) -> None:
    """Tells the others that this process ends as it should."""
    self._is_over = True
    self._send(None)

  def fail(self, error: BaseException) -> None:
    """Tells the others why this process ends, and makes it end at its exit."""
    if not isinstance(error, errors.InputError):
      # If the cause is another process, its connection ends this one meanwhile.
      time.sleep(ECHO_SECONDS)
    is_refusal = isinstance(error, errors.InputError | OSError)
    text = str(error) if is_refusal else f"{type(error).__name__}: {error}"
    failure = Failure(jax.process_index(), text, 2 if is_refusal else 1)
    with self._lock:
      self._is_over = True
    self._send(failure)
    # Before JAX's own exit, which waits for the others.
    atexit.register(_exit, failure.status)

  def _listen(self, process: int, link: socket.socket) -> None:
    try:
      with link, link.makefile("rb") as lines:
        line = lines.readline(LONGEST_LINE)
    except OSError:  # the connection was reset
      line = b""
    if not line:
      self._end(
        Failure(
          process,
          "was killed, or its host is gone; the finished stages and the last "
          "saved step are in the workdir: give the same command again",
          1,
        )
      )
    elif found := json.loads(line):
      self._end(Failure(*found))

  def _end(self, failure: Failure) -> None:
    """Ends this process because of another."""
    with self._lock:  # and not twice
      if self._is_over:
        return
      self._is_over = True
      self._send(failure)
      process, text, status = failure
      sys.stderr.write(
        f"error: process {process + 1} of {len(self._hosts)} on "
        f"{self._hosts[process]}: {text}\n"
      )
      _exit(status)

  def _send(self, failure: Failure | None) -> None:
    if failure:
      failure = failure._replace(text=failure.text[: LONGEST_LINE // 8])
    for link in self._links.values():
      with contextlib.suppress(OSError):  # it is gone already
        link.sendall(json.dumps(failure).encode() + b"\n")


def _connect() -> tuple[list[str], dict[int, socket.socket]]:
  """Connects all processes to process 0; returns hosts and {process: link}."""
  hosts = distributed.gather_lists([socket.gethostname()])
  own = jax.process_index()
  links: dict[int, socket.socket] = {}
  if distributed.is_lead():
    token = secrets.token_hex()
    with socket.create_server(
      (_own_address(hosts), 0), backlog=len(hosts)
    ) as listener:
      address = listener.getsockname()
      distributed.gather_lists([(*address, token)])
      arrived = distributed.gather_lists([])
      links = _accept(listener, token, len(arrived))
    lost = {*range(1, len(hosts))} - links.keys()
    if lost:
      progress.say(
        f"process(es) {', '.join(map(str, sorted(lost)))} cannot reach process "
        f"0 at {address[0]}:{address[1]}; if one fails, the others end after "
        "100 s"
      )
  else:
    ((*address, token),) = distributed.gather_lists([])
    with contextlib.suppress(OSError):
      link = socket.create_connection(tuple(address), CONNECT_SECONDS)
      link.sendall(f"{token} {own}\n".encode())
      link.settimeout(None)
      links[0] = link
    distributed.gather_lists([own] if links else [])
  return hosts, links


def _accept(
  listener: socket.socket, token: str, count: int
) -> dict[int, socket.socket]:
  """Returns {process: link} of so many that have connected; drops strangers."""
  links: dict[int, socket.socket] = {}
  listener.settimeout(CONNECT_SECONDS)
  while len(links) < count:
    try:
      link, _ = listener.accept()
    except TimeoutError:
      break
    link.settimeout(CONNECT_SECONDS)
    try:
      # Without a buffer, which would swallow what follows.
      with link.makefile("rb", buffering=0) as lines:
        given, _, process = lines.readline(256).partition(b" ")
      if not secrets.compare_digest(given, token.encode()):
        raise ValueError("a stranger")
      links[int(process)] = link
      link.settimeout(None)
    except (OSError, ValueError):
      link.close()
  return links


def _own_address(hosts: Sequence[str]) -> str:
  """Returns an address at which the other hosts reach this one."""
  if len(set(hosts)) == 1:
    return "127.0.0.1"
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      # Sends nothing: it looks up which of the addresses leads outside.
      probe.connect(("192.0.2.1", 1))
    except OSError:
      return socket.gethostname()
    return str(probe.getsockname()[0])


def _exit(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
