"""A bucket of Google Cloud Storage in memory, for all who would ask for one.

`etils.epath` asks fsspec, and orbax's tensorstore the service's HTTP interface;
here both see the same objects. Nothing can be renamed or appended to, as in a
real bucket.
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

import fsspec
from fsspec.implementations import memory

NAME = "bucket"
_OBJECTS = f"/storage/v1/b/{NAME}/o"


class FileSystem(memory.MemoryFileSystem):
  """What fsspec shows of it: gs://bucket/... ."""

  protocol = ("gcs", "gs")
  store: dict = {}
  pseudo_dirs = [""]

  @classmethod
  def _strip_protocol(cls, path: str) -> str:
    return "/" + re.sub(r"^(gs|gcs)://", "", str(path)).strip("/")

  def mv(self, *args: object, **kwargs: object) -> None:
    """Refused."""
    raise NotImplementedError("a bucket renames nothing")

  def _open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
    if "a" in mode or "+" in mode:
      raise NotImplementedError("a bucket appends nothing")
    return super()._open(path, mode, **kwargs)


class _Handler(http.server.BaseHTTPRequestHandler):
  """The few requests that tensorstore makes."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *args: object) -> None:
    """Silent."""

  def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _metadata(self, name: str) -> dict[str, str]:
    file = FileSystem.store[f"/{NAME}/{name}"]
    generation = str(int(1e6 * file.modified.timestamp()))
    size = str(len(file.getvalue()))
    return {"name": name, "generation": generation, "size": size}

  def _parsed(self) -> tuple[str, dict[str, str]]:
    split = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(split.query))
    name = urllib.parse.unquote(split.path.removeprefix(f"{_OBJECTS}/"))
    return name, query

  def do_GET(self) -> None:
    """Reads an object, or lists them."""
    name, query = self._parsed()
    if name == _OBJECTS:
      prefix = f"/{NAME}/"
      names = sorted(path.removeprefix(prefix) for path in FileSystem.store)
      wanted = [n for n in names if n.startswith(query.get("prefix", ""))]
      items = {"items": [self._metadata(n) for n in wanted]}
      self._answer(200, json.dumps(items).encode())
      return
    if f"/{NAME}/{name}" not in FileSystem.store:
      self._answer(404)
      return
    data = FileSystem.store[f"/{NAME}/{name}"].getvalue()
    told = self._metadata(name)
    if query.get("alt") != "media":
      self._answer(200, json.dumps(told).encode())
      return
    headers = {"x_goog_generation": told["generation"]}
    asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if asked is None:
      self._answer(200, data, **headers)
      return
    first = int(asked[1])
    last = min(int(asked[2] or len(data)), len(data) - 1)
    span = f"bytes {first}-{last}/{len(data)}"
    self._answer(206, data[first : last + 1], Content_Range=span, **headers)

  def do_POST(self) -> None:
    """Writes an object whole."""
    _, query = self._parsed()
    data = self.rfile.read(int(self.headers["Content-Length"]))
    path = f"/{NAME}/{query['name']}"
    FileSystem.store[path] = memory.MemoryFile(FileSystem(), path, data)
    self._answer(200, json.dumps(self._metadata(query["name"])).encode())

  def do_DELETE(self) -> None:
    """Removes an object."""
    name, _ = self._parsed()
    found = FileSystem.store.pop(f"/{NAME}/{name}", None)
    self._answer(404 if found is None else 204)


@contextlib.contextmanager
def serve() -> Iterator[str]:
  """Runs the service; gives its address, for TENSORSTORE_GCS_HTTP_URL."""
  fsspec.register_implementation("gcs", FileSystem, clobber=True)
  server = http.server.ThreadingHTTPServer(("localhost", 0), _Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://localhost:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
    FileSystem.store.clear()
