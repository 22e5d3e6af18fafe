"""Programs that were kept need not be compiled again."""

import os
import stat
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from pqf_jax import errors
from pqf_jax.runtime import compilation

SETTINGS = (
  "jax_enable_compilation_cache",
  "jax_compilation_cache_dir",
  "jax_compilation_cache_max_size",
  "jax_persistent_cache_min_compile_time_secs",
)
HIT, MISS = (
  "/jax/compilation_cache/cache_hits",
  "/jax/compilation_cache/cache_misses",
)


@pytest.fixture
def events(monkeypatch):
  """Returns what jax says of its cache; restores its settings."""
  monkeypatch.setattr(compilation, "LEAST_SECONDS", 0.0)
  before = {name: jax.config.values[name] for name in SETTINGS}
  heard = []

  def listen(event, **kwargs):
    if event in (HIT, MISS):
      heard.append(event)

  monitoring.register_event_listener(listen)
  compilation_cache.reset_cache()
  yield heard
  monitoring.unregister_event_listener(listen)
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def run_as_a_new_process_would():
  jax.clear_caches()
  compilation_cache.reset_cache()
  x = jnp.arange(7.0)
  return float(jax.jit(lambda x: jnp.sin(x) @ x)(x))


def test_a_second_process_compiles_nothing(tmp_path, events):
  compilation.keep_programs(str(tmp_path / "new"), 100)
  first = run_as_a_new_process_would()
  assert set(events) == {MISS}
  num_programs = len(events)
  events.clear()
  second = run_as_a_new_process_would()
  assert events == [HIT] * num_programs
  assert first == second


def test_off_means_off(tmp_path, events, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  compilation.keep_programs("off", 100)
  run_as_a_new_process_would()
  run_as_a_new_process_would()
  assert not events
  assert not list(tmp_path.iterdir())


def test_auto_is_the_users_own_folder(tmp_path, events, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  compilation.keep_programs("auto", 100)
  run_as_a_new_process_would()
  folder = tmp_path / "cache/pqf_jax"
  assert len(list(folder.glob("*-cache"))) == len(events) > 0
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert jax.config.values["jax_compilation_cache_max_size"] == 100_000_000


def test_auto_leaves_the_choice_of_the_environment(
  tmp_path, events, monkeypatch
):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  before = {name: jax.config.values[name] for name in SETTINGS}
  compilation.keep_programs("auto", 100)
  assert before == {name: jax.config.values[name] for name in SETTINGS}
  assert not list(tmp_path.iterdir())


def test_a_program_cut_off_is_written_again(tmp_path, events):
  compilation.keep_programs(str(tmp_path), 100)
  first = run_as_a_new_process_would()
  programs = sorted(tmp_path.glob("*-cache"))
  whole = [program.read_bytes() for program in programs]
  for program in programs:  # as a process does that is killed meanwhile
    program.write_bytes(program.read_bytes()[:100])
    program.with_name(program.name.removesuffix("cache") + "atime").unlink()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    compilation.keep_programs(str(tmp_path), 100)
    assert run_as_a_new_process_would() == first
  assert sorted(tmp_path.glob("*-cache")) == programs
  sizes = [len(program.read_bytes()) for program in programs]
  assert sizes == pytest.approx([len(data) for data in whole], rel=0.1)


def test_a_folder_that_cannot_be_written(tmp_path, events, monkeypatch, capsys):
  before = jax.config.values["jax_compilation_cache_dir"]
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  file = tmp_path / "file"
  file.touch()
  with pytest.raises(
    errors.InputError, match="compilation_cache=FOLDER or off"
  ):
    compilation.keep_programs(str(file / "x"), 100)
  monkeypatch.setenv("XDG_CACHE_HOME", str(file))
  compilation.keep_programs("auto", 100)  # works without
  assert "cannot be kept" in capsys.readouterr().out
  assert jax.config.values["jax_compilation_cache_dir"] == before


@pytest.mark.slow
def test_a_second_job_finds_all_that_the_first_kept(tmp_path):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
  env.pop("JAX_COMPILATION_CACHE_DIR", None)

  def run(name, *settings):
    command = [sys.executable, "-m", "tests.pipeline.tiny"]
    done = subprocess.run(
      [*command, str(tmp_path / name), *settings],
      env=env,
      capture_output=True,
      text=True,
      check=True,
    )
    assert "cache entry" not in done.stderr
    return (tmp_path / name / "model.safetensors").read_bytes()

  def last_uses():
    times = tmp_path.glob("pqf_jax/*-atime")
    return {file.name: file.read_bytes() for file in times}

  packed = run("first")
  first = last_uses()
  assert len(first) > 10
  assert run("second") == packed
  second = last_uses()
  assert all(second[name] != used for name, used in first.items())
  assert run("off", "compilation_cache=off") == packed
  assert last_uses() == second
