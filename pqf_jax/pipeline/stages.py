"""Runs the stages in order, from loading or training to packing.

Every stage is restored from its checkpoint if an earlier run finished it, so
the same command goes on where it stopped.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from pqf_jax import calibrate, pack, permute, quantize, report
from pqf_jax.core import channels, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import planning, settings, training, workspace
from pqf_jax.pipeline import results as telling
from pqf_jax.runtime import checkpoint, distributed, progress

PyTree = Any
Staged = tuple[PyTree, checkpoint.Record]
# Most images that a calibration evaluates together.
CALIBRATION_BATCH = 64


def compress(config: ml_collections.ConfigDict, workdir: str | None) -> None:
  """Runs the whole job, from wherever an earlier run of it stopped."""
  name = workdir or f"runs/{config.name}"
  with workspace.Workspace(name, config) as files:
    job = jobs.prepare(config, files)
    results = files.results()
    if results:
      progress.show(report.closing_table(results))
      progress.say(f"already done: {files.packed_file}, {files.report_file}")
      return
    dense, dense_record = dense_stage(job)
    job = plan_stage(job, dense)
    permuted, permute_record = permute_stage(job, dense)
    quantized, quantize_record = quantize_stage(job, permuted)
    records = {
      "dense": dense_record,
      "permuted": permute_record,
      "quantized": quantize_record,
    }
    start = quantized
    if config.calibrate.images:
      calibrated, record = calibrate_stage(job, permuted, quantized)
      records["calibrated"] = record
      # Without training the calibrated network is what there is.
      if config.finetune_from == "calibrated" or not config.finetune.epochs:
        start = calibrated
    tuned, records["finetuned"] = finetune_stage(job, dense, start)
    finish(job, dense, tuned, records)


def dense_stage(job: jobs.Job) -> Staged:
  """Returns the trained network: read from a file, or trained here."""

  def take() -> Staged:
    return job.evaluated(job.weights)

  def train() -> Staged:
    sample = job.task.sample(job.config)
    variables = jax.jit(job.network.init)(job.key("init"), *sample)
    variables = trees.replace(variables, job.backbone)
    wanted = job.config.train
    fitted, record = fit(
      job, "train", variables, wanted, backbone_rate=wanted.backbone_rate
    )
    return fitted.last, record

  staged = job.run(
    "dense", job.template, train if job.weights is None else take
  )
  job.files.checkpoints.drop_progress("train")
  return staged


def plan_stage(job: jobs.Job, dense: PyTree) -> jobs.Job:
  """Returns the job with rules for `config.target_bytes`, where it is given."""
  if not job.config.target_bytes:
    return job

  def compute() -> Staged:
    progress.say(f"choosing rules for {job.config.target_bytes:,} bytes")
    rules = planning.choose_rules(job.config, job.loaded, dense)
    return {}, {"rules": rules}

  _, record = job.run("plan", {}, compute)
  return job.planned(record["rules"])


def permute_stage(job: jobs.Job, dense: PyTree) -> Staged:
  """Reorders the channels; the function stays the same."""

  def compute() -> Staged:
    axes = discover.discover_channels(
      job.network.apply, dense, *job.task.sample(job.config)
    )
    num_groups = len(channels.group_sizes(dense, axes))
    with progress.track("permute", num_groups, unit="groups") as bar:
      variables, permutations, groups = permute.permute_channels(
        job.key("permute"),
        dense,
        axes,
        job.plan,
        search=settings.SEARCHES[job.config.permute.search],
        kmeans_steps=job.config.permute.kmeans_steps,
        share=lambda costs: distributed.divide_work(costs)[jax.process_index()],
        gather=distributed.gather_records,
        on_group=lambda group: bar.advance(),
      )
    rows = [group._asdict() for group in groups]
    progress.show(report.permutation_table(rows))
    return job.evaluated(
      variables,
      groups=rows,
      permutations={
        group: permutation.tolist()
        for group, permutation in permutations.items()
      },
    )

  return job.run("permute", job.template, compute)


def quantize_stage(job: jobs.Job, permuted: PyTree) -> Staged:
  """Replaces the planned kernels by codebooks and codes."""
  target = plans.compressed_shapes(job.plan, job.template)
  target_nodes = trees.flatten(target, vq_array.is_vq)

  def compute() -> Staged:
    shares = distributed.divide_work(plans.kmeans_cost(job.plan, job.template))
    mine = {path: job.plan[path] for path in shares[jax.process_index()]}
    with progress.track("quantize", len(mine), unit="layers") as bar:
      variables, layers = quantize.quantize_params(
        job.key("quantize"),
        permuted,
        mine,
        annealed=job.config.quantize.annealed,
        mesh=distributed.mesh(tuple(jax.local_devices())),
        on_layer=lambda layer: bar.advance(distortion=layer.distortion),
      )
    nodes = distributed.gather_trees(
      shares, trees.flatten(variables, vq_array.is_vq), target_nodes
    )
    lost = distributed.gather_records(
      {path: layer.distortion for path, layer in layers.items()}
    )
    distortion = {path: lost[path] for path in job.plan}
    return job.evaluated(trees.replace(permuted, nodes), distortion=distortion)

  return job.run("quantize", target, compute)


def calibrate_stage(
  job: jobs.Job, permuted: PyTree, quantized: PyTree
) -> Staged:
  """Makes the quantized network follow the permuted one, without training.

  Process 0 does it for all: their sums may differ in the last bit.
  """
  wanted = job.config.calibrate
  shapes = trees.flatten(trees.shapes(quantized), vq_array.is_vq)

  def compute() -> Staged:
    leaves: dict[str, Any] = {}
    layers: dict[str, calibrate.LayerError] = {}
    if distributed.is_lead():
      num_images = min(wanted.images, job.loaded.num_train)
      size = min(CALIBRATION_BATCH, job.config.eval_batch_size, num_images)
      with progress.track("calibrate", len(job.plan), unit="layers") as bar:
        variables, layers = calibrate.calibrate_params(
          job.loaded.outputs,
          permuted,
          quantized,
          job.loaded.samples(
            permuted, size, num_images // size, job.config.seed
          ),
          rounds=wanted.rounds,
          damping=wanted.damping,
          mask_fn=job.loaded.mask_fn,
          on_layer=lambda layer: bar.advance(error=layer.after),
        )
      leaves = trees.flatten(variables, vq_array.is_vq)
    everything: list[list[str]] = [[] for _ in range(jax.process_count())]
    everything[0] = list(shapes)
    leaves = distributed.gather_trees(everything, leaves, shapes)
    errors_of = {path: layer._asdict() for path, layer in layers.items()}
    return job.evaluated(
      trees.replace(permuted, leaves),
      output_error=distributed.gather_records(errors_of),
    )

  return job.run("calibrate", trees.shapes(quantized), compute)


def finetune_stage(job: jobs.Job, dense: PyTree, quantized: PyTree) -> Staged:
  """Trains codebooks, norms and biases."""

  def compute() -> Staged:
    teacher = dense if job.config.distillation.share else None
    return fit(job, "finetune", quantized, job.config.finetune, teacher)

  target = trees.shapes(training.Fitted(quantized, quantized))
  fitted, record = job.run("finetune", target, compute)
  return getattr(fitted, job.config.pack), record


def fit(
  job: jobs.Job,
  stage: str,
  variables: PyTree,
  stage_settings: ml_collections.ConfigDict,
  teacher: PyTree | None = None,
  backbone_rate: float = 1.0,
) -> tuple[training.Fitted, checkpoint.Record]:
  """Runs `training.fit` with the settings of a config; 0 epochs do nothing."""
  task = job.loaded.for_stage(stage)
  if not stage_settings.epochs:
    _, record = job.evaluated(variables)
    return training.Fitted(variables, variables), record
  schedule = training.Schedule(
    stage_settings, task.num_train, job.config.checkpoint_steps
  )

  def batches(first_step: int) -> Iterator[Any]:
    job.files.resume_log(stage, first_step + 1)
    global_batches = task.train_batches(
      batch_size=stage_settings.batch_size,
      seed=job.config.seed,
      start_step=first_step,
      num_steps=schedule.num_steps - first_step,
    )
    if teacher is None:
      return global_batches
    return map(task.make_teacher(teacher), global_batches)

  return training.fit(
    stage,
    variables,
    schedule,
    loss_fn=task.make_loss(teacher is not None),
    batches=batches,
    evaluate=task.evaluate,
    metric=next(iter(job.task.metrics)),
    key=job.key(f"{stage} steps"),
    frozen=job.config.frozen,
    slow=job.backbone,
    slow_rate=backbone_rate,
    checkpoints=job.files.checkpoints,
    on_metrics=job.files.log,
  )


def finish(
  job: jobs.Job,
  dense: PyTree,
  variables: PyTree,
  records: dict[str, checkpoint.Record],
) -> None:
  """Packs, evaluates the packed file, and writes results and report."""
  start = time.perf_counter()
  files = job.files
  packed = jobs.write_packed(job.config, job.network, files, variables)
  loaded, record = job.evaluated(pack.load(files.packed_file))
  records["packed"] = record | {"seconds": time.perf_counter() - start}
  storage = settings.make_storage(job.config)
  size = plans.predict_size(job.plan, job.template, storage)
  results = telling.make_results(job, size, packed.payload_bytes, records)
  if distributed.is_lead():
    pictures = job.loaded.pictures({"dense": dense, "compressed": loaded})
    telling.write_report(job, size.layers, records, results, pictures)
  files.write_results(results)
  progress.show(report.closing_table(results))
  progress.say(f"written: {files.packed_file}, {files.report_file}")
