"""Strict numerics for every test, bounded memory, and optional real data."""

import atexit
import ctypes
import gc
import os
import pathlib
import shutil
import tempfile

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Arrays go back to the system when they are freed: by itself glibc would keep
# them, 0.4 GB at the peak of a worker.
LIBC = ctypes.CDLL(None)
if hasattr(LIBC, "mallopt"):
  LIBC.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD

# Tests, workers and the processes that they start share compiled programs: most
# of the suite's time is compilation, and many tests run the same small job.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _folder = tempfile.mkdtemp(prefix="pqf_jax_")
  atexit.register(shutil.rmtree, _folder)
  for _name, _value in (
    ("jax_compilation_cache_dir", _folder),
    ("jax_persistent_cache_min_compile_time_secs", 0.1),
    ("jax_persistent_cache_min_entry_size_bytes", 0),
  ):
    os.environ[_name.upper()] = str(_value)
    jax.config.update(_name, _value)

# What a worker needs, with the processes that its tests start.
WORKER_BYTES = 3 << 30


def pytest_xdist_auto_num_workers() -> int:
  """Returns the workers of `-n auto`: a core and enough memory for each."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return max(1, min(os.cpu_count() or 1, memory // WORKER_BYTES))


def pytest_xdist_make_scheduler(config, log):
  """Keeps a module on one worker: its tests share programs and finished jobs.

  They begin in the order of their paths.
  """
  from xdist import scheduler  # which other runs need not have

  if config.getoption("dist") != "load":
    return None  # another one was asked for
  config.option.loadscopereorder = False
  return scheduler.LoadFileScheduling(config, log)


# Compiled as for users: where laws are about bits, and where jobs run so often
# that slow programs would cost more than their compilation.
OPTIMIZED = (
  "core/",
  "kmeans/",
  "numerics/",
  "packing/",
  "pipeline/test_stages.py",
  "pipeline/test_workspace.py",
  "test_pack.py",
  "test_quantize.py",
)


def pytest_collection_finish() -> None:
  """Spares the garbage collector what imports made: a fifth of all time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs(request):
  """Compiles cheaply but for `OPTIMIZED`, and drops what was compiled.

  A worker would grow to 5 GB by the programs of all modules.
  """
  module = request.path.relative_to(pathlib.Path(__file__).parent).as_posix()
  is_cheap = not module.startswith(OPTIMIZED)
  jax.config.update("jax_disable_most_optimizations", is_cheap)
  with pytest.MonkeyPatch.context() as patch:  # of processes that tests start
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(is_cheap))
    yield
  jax.clear_caches()
  gc.collect()
  if hasattr(LIBC, "malloc_trim"):  # what is smaller than that
    LIBC.malloc_trim(0)


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Real images and weights; the test is skipped where they are absent."""
  folder = os.environ.get("PQF_JAX_SHARED")
  if not folder:
    pytest.skip("PQF_JAX_SHARED names no folder of real data")
  return pathlib.Path(folder) / "data"
