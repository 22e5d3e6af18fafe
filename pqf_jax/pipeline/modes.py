"""What `config.mode` may ask for: the whole job, or a part of it."""

from typing import Any

import ml_collections

from pqf_jax import errors, preflight
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import stages, tasks, workspace
from pqf_jax.runtime import distributed, files, progress

PyTree = Any


def run(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Does what `config.mode` says.

  Args:
    config: see `configs/common.py`.
    workdir: where everything goes; None: runs/<name>.

  Raises:
    InputError: bad input, found before any long work wherever that can be.
  """
  if config.mode == "preflight":
    # Before any device is used: it brings its own, and no other processes.
    preflight.run(config)
    return
  distributed.start(config.distributed, timeout_seconds=config.cluster_timeout)
  progress.say_everywhere(distributed.banner())
  distributed.check_agreement(
    {
      "config": config.to_dict(),
      "code": workspace.code_digest(),
      "packages": distributed.package_versions(),
    }
  )
  modes = {
    "compress": stages.compress,
    "evaluate": evaluate,
    "pack": repack,
    "plan": show_plan,
    "predict": predict,
    "train": train,
  }
  jobs.check_choice("mode", config.mode, [*modes, "preflight"])
  modes[config.mode](config, workdir)


def show_plan(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Prints the plan; the last line is `payload_bytes=N`. Needs no data."""
  del workdir
  _, template = jobs.build_model(config)
  size = jobs.print_plan(jobs.make_plan(config, template), template)
  progress.say(f"payload_bytes={size.payload_bytes}")


def train(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Stage 0 alone: its checkpoint, and its accuracy in results.json."""
  if config.weights:
    raise errors.InputError(
      f"config.mode=train trains from scratch, but config.weights is "
      f"{config.weights!r}; leave it out"
    )
  files = workspace.Workspace(workdir or f"runs/{config.name}_train", config)
  _, record = stages.dense_stage(jobs.prepare(config, files))
  files.write_results(record)
  progress.say(f"written: {files.results_file}")


def evaluate(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Counts the accuracy of `config.weights`; writes results.json."""
  module, variables = read_weights(config)
  jobs.check_batches(config, stages=())
  task = tasks.load(config, module)
  files = workspace.Workspace(workdir or f"runs/{config.name}_evaluate", config)
  files.claim()
  accuracy = task.evaluate(variables)
  files.write_results({"weights": config.weights} | accuracy)
  progress.say(
    " ".join(f"{name}={value:.6g}" for name, value in accuracy.items())
  )


def repack(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Writes `config.weights` as a file of this library, without any stage."""
  module, variables = read_weights(config)
  files = workspace.Workspace(workdir or f"runs/{config.name}_pack", config)
  files.claim()
  packed = jobs.write_packed(config, module, files, variables)
  progress.say(
    f"written: {files.packed_file} payload_bytes={packed.payload_bytes}"
  )


def predict(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Finds the objects of one image by `config.weights`."""
  if config.task != "detection" or not config.image:
    raise errors.InputError(
      f"config.mode=predict is for detection and needs --config.image=FILE; "
      f"config.task is {config.task!r}, config.image {config.image!r}"
    )
  from pqf_jax.pipeline import detection_task  # see tasks

  module, variables = read_weights(config)
  folder = files.absolute(workdir or f"runs/{config.name}_predict")
  written = detection_task.predict(config, module, variables, folder)
  progress.say(f"written: {', '.join(map(str, written))}")


def read_weights(config: ml_collections.ConfigDict) -> tuple[Any, PyTree]:
  """(module, the variables that `config.weights` names)."""
  if not config.weights:
    raise errors.InputError(
      f"config.mode={config.mode} needs --config.weights=FILE.safetensors"
    )
  module, template = jobs.build_model(config)
  return module, jobs.read_weights(config, module, template)
