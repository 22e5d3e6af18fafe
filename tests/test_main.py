"""The command line: bad input gives one message and status 2, no traceback."""

import multiprocessing
import os
import pathlib
import resource
import runpy
import subprocess
import sys
from typing import NamedTuple

import jax
import pytest

from pqf_jax.runtime import xla_flags

ROOT = pathlib.Path(__file__).parents[1]


class _Done(NamedTuple):
  returncode: int | None
  stdout: str
  stderr: str


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns (arguments, folder) -> what `python main.py` says and returns.

  Its processes are forks of one that has imported everything, which takes much
  longer than what they do.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["pqf_jax.cli"])
  told = tmp_path_factory.mktemp("told")

  def run(*arguments, folder=ROOT):
    files = told / "stdout", told / "stderr"
    process = context.Process(target=_main, args=(arguments, folder, files))
    process.start()
    process.join()
    return _Done(process.exitcode, *(file.read_text() for file in files))

  return run


def _main(arguments, folder, files):
  for descriptor, file in enumerate(files, start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
  os.chdir(folder)
  jax.config.update("jax_platforms", "cpu")
  sys.argv = [str(ROOT / "main.py"), *arguments]
  runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "no recipe given"),
    (("--config=configs/nope.py",), "no recipe 'configs/nope.py'"),
    (
      ("--config=configs/resnet18.py:cifar11",),
      "no variant 'cifar11'; its words are best, cifar10,",
    ),
    (
      ("--config=configs/resnet18.py", "--config.finetune.epoch=3"),
      "config.finetune.epoch; did you mean config.finetune.epochs",
    ),
    (
      ("--config=configs/resnet18.py", "--config.epochs=3"),
      "did you mean config.finetune.epochs or config.train.epochs?",
    ),
    (
      ("extra", "--config=configs/resnet18.py"),
      "unknown argument 'extra'",
    ),
    (
      ("--config=configs/resnet18.py", "--config.finetune.epochs=few"),
      "'few'",
    ),
    (("--config=configs/resnet18.py", "--config.mode=fit"), "'fit'"),
    (
      ("--recipe=own_images", "--config.mode=plan"),
      "num_classes is 0, so that the classes of the data are counted: image_f",
    ),
    (("--recipe=own_images:resnet18,resnet50",), "name one architecture, not"),
    (
      ("--config=configs/resnet18.py:cifar10",),
      "give --config.weights=FILE.safetensors",
    ),
  ],
)
def test_bad_input_is_one_message(run, arguments, message):
  done = run(*arguments)
  assert done.returncode == 2
  errors = done.stderr.strip().splitlines()
  assert errors[-1].startswith("error: ")
  assert message in errors[-1]
  assert "Traceback" not in done.stderr


def test_help_lists_recipes_modes_and_settings(run):
  for flag in ("-h", "--help"):
    done = run(flag)
    assert done.returncode in (0, None)
    for word in ("resnet18", "evaluate", "finetune.epochs", "[9]"):
      assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_recipes_are_found_by_name_in_any_folder(run, tmp_path):
  for words in (
    ("--recipe=resnet18:cifar10", "--config.mode=plan"),
    ("--config.mode=plan", "--recipe", "resnet18:cifar10"),
  ):
    done = run(*words, folder=tmp_path)
    assert done.stdout.endswith("payload_bytes=1392168\n"), done.stderr


def test_missing_data_is_named_before_any_work(tmp_path):
  workdir = tmp_path / "run"
  done = subprocess.run(
    [sys.executable, "main.py", "--config=configs/resnet18.py:cifar10"]
    + ["--config.train.epochs=1", f"--config.data.dir={tmp_path}"]
    + [f"--workdir={workdir}"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert str(tmp_path) in done.stderr
  assert "download_and_prepare" in done.stderr
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("recipe", "payload_bytes"),
  [
    ("resnet18.py:imagenet2012", 1615904),
    ("resnet18.py:imagenet2012,large", 1079328),
    ("resnet50.py:imagenet2012", 5339296),
    ("resnet50.py:imagenet2012,large", 3339872),
  ],
)
def test_plan_gives_the_published_sizes(run, recipe, payload_bytes, tmp_path):
  # Elsewhere than in the project's folder: no data, no weights, no workdir.
  done = run(
    f"--config={ROOT}/configs/{recipe}", "--config.mode=plan", folder=tmp_path
  )
  assert done.stdout.splitlines()[-1] == f"payload_bytes={payload_bytes}"
  assert not list(tmp_path.iterdir())


def test_preflight_gets_an_unlimited_stack_and_the_same_arguments():
  _, most = resource.getrlimit(resource.RLIMIT_STACK)
  if most != resource.RLIM_INFINITY:
    pytest.skip("the stack of this machine is limited")
  script = (
    "import resource, sys\n"
    "from pqf_jax import cli\n"
    "print('begun')\n"
    "cli._grow_stack()\n"
    "print(resource.getrlimit(resource.RLIMIT_STACK)[0], sys.argv[1:])"
  )
  told = subprocess.run(
    ["sh", "-c", 'ulimit -S -s 8192; exec "$@"', "sh"]
    + [sys.executable, "-c", script, "--one", "two"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  # Twice: a limit raised in a running process helps no thread of it.
  assert told.stdout.splitlines() == ["begun", "begun", "-1 ['--one', 'two']"]


def test_xla_flags_of_the_user_win(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
  xla_flags.set_defaults()
  given = os.environ["XLA_FLAGS"].split()
  assert given == [*xla_flags.FLAGS, "--xla_cpu_prefer_vector_width=256"]
  dump = "import jax; jax.jit(lambda x: x + 1)(1); print('accepted')"
  done = subprocess.run(
    [sys.executable, "-c", dump], capture_output=True, text=True, check=False
  )
  assert "accepted" in done.stdout, done.stderr
