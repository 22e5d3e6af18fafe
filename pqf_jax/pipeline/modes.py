"""Runs what `config.mode` asks for: the whole job, or a part of it."""

import importlib
from typing import Any

import jax
import ml_collections

from pqf_jax import errors, tasks
from pqf_jax.core import vq_array
from pqf_jax.models import contract
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import planning, settings, stages, weights, workspace
from pqf_jax.runtime import compilation, distributed, files, peers, progress

PyTree = Any


def run(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Does what `config.mode` says.

  Args:
    config: see `configs/common.py`.
    workdir: folder of all results; None: runs/<name>.

  Raises:
    InputError: bad input, found before any long work wherever that can be.
  """
  settings.check(config)
  given, config = config, jobs.count_classes(config)
  if not (workdir or config.name):
    raise errors.InputError(
      "config.name is empty, but names the default workdir, runs/NAME; give "
      "--config.name or --workdir"
    )
  if config.mode == "preflight":
    # Before any device is used: it brings its own, and no other processes.
    importlib.import_module("pqf_jax.preflight").run(config)
    return
  distributed.start(
    config.distributed, timeout_seconds=config.distributed_timeout
  )
  compilation.keep_programs(
    config.compilation_cache, config.compilation_cache_megabytes
  )
  progress.say_everywhere(distributed.banner())
  if config is not given:
    progress.say(f"{config.data.name}: {config.model.num_classes} classes")
  with peers.end_together():
    _run_mode(config, workdir)


def _run_mode(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Does what `config.mode` says, on all processes."""
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
    "export": export,
    "pack": repack,
    "plan": show_plan,
    "predict": predict,
    "train": train,
  }
  modes[config.mode](config, workdir)


def show_plan(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Prints the plan; the last line is `payload_bytes=N`.

  It needs data and weights where it is to choose rules, and prints them.
  """
  del workdir
  network, template = jobs.build_network(config)
  planning.check_target(config, network, template)
  rules = config.rules
  if config.target_bytes:
    network, variables = read_weights(config)
    loaded = tasks.get(config.task).load(config, network)
    dense = vq_array.decode_params(variables)
    rules = planning.choose_rules(config, loaded, dense)
    for rule in rules:
      progress.say(f"{tuple(rule)},")
  plan = planning.make_plan(config, network, template, rules)
  size = planning.print_plan(config, plan, template)
  progress.say(f"payload_bytes={size.payload_bytes}")


def train(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Runs stage 0 alone: its checkpoint, and its evaluation in results.json."""
  if config.weights:
    raise errors.InputError(
      f"config.mode=train trains from scratch, but config.weights is "
      f"{config.weights!r}; leave it out"
    )
  name = workdir or f"runs/{config.name}_train"
  with workspace.Workspace(name, config) as files:
    _, record = stages.dense_stage(jobs.prepare(config, files))
    files.write_results(record["evaluation"] | {"seconds": record["seconds"]})
  progress.say(f"written: {files.results_file}")


def evaluate(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Evaluates `config.weights`; writes results.json."""
  network, variables = read_weights(config)
  jobs.check_batches(config, stages=())
  loaded = tasks.get(config.task).load(config, network)
  if loaded.beside is not None:
    raise errors.InputError(
      f"the figures of task {config.task!r} compare a network with the dense "
      "one, which config.mode=evaluate does not have; results.json of "
      "config.mode=compress has them"
    )
  name = workdir or f"runs/{config.name}_evaluate"
  with workspace.Workspace(name, config) as files:
    files.claim()
    evaluation = loaded.evaluate(variables)
    files.write_results({"weights": config.weights} | evaluation)
  progress.say(
    " ".join(f"{name}={value:.6g}" for name, value in evaluation.items())
  )


def repack(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Writes `config.weights` as a file of this library, without any stage."""
  network, variables = read_weights(config)
  name = workdir or f"runs/{config.name}_pack"
  with workspace.Workspace(name, config) as files:
    files.claim()
    packed = jobs.write_packed(config, network, files, variables)
  progress.say(
    f"written: {files.packed_file} payload_bytes={packed.payload_bytes}"
  )


def export(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Writes `config.weights` dense, as `torch.safetensors` with torch's names.

  The weights of a compressed file are those of `pqf_jax.load`: its norms have
  their statistics folded into scale and bias.
  """
  _, variables = read_weights(config)
  data = weights.to_torch(variables, config.model.name)
  name = workdir or f"runs/{config.name}_export"
  with workspace.Workspace(name, config) as run_files:
    run_files.claim()
    path = files.absolute(name) / "torch.safetensors"
    if distributed.is_lead():
      files.write(path, data)
  progress.say(f"written: {path}")


def predict(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Runs `config.weights` on one image and writes what they find."""
  task: Any = tasks.get(config.task)
  able = [name for name in tasks.names() if hasattr(tasks.get(name), "predict")]
  if config.task not in able or not config.image:
    raise errors.InputError(
      f"config.mode=predict is for {', '.join(able)} and needs "
      f"--config.image=FILE; config.task is {config.task!r}, config.image "
      f"{config.image!r}"
    )
  network, variables = read_weights(config)
  folder = files.absolute(workdir or f"runs/{config.name}_predict")
  written = task.predict(config, network, variables, folder)
  progress.say(f"written: {', '.join(map(str, written))}")


def read_weights(
  config: ml_collections.ConfigDict,
) -> tuple[contract.Network, PyTree]:
  """Returns the network and the variables that `config.weights` names."""
  if not config.weights:
    raise errors.InputError(
      f"config.mode={config.mode} needs --config.weights=FILE.safetensors"
    )
  network, template = jobs.build_network(config)
  tasks.get(config.task).check(
    config, network, template, num_devices=jax.device_count()
  )
  return network, jobs.read_weights(config, network, template)
