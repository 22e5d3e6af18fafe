"""What is compressed and how: by the rules of a config, or for its bytes."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from pqf_jax import budget, errors, report, tasks
from pqf_jax.core import plan as plans
from pqf_jax.discovery import kernels
from pqf_jax.models import contract
from pqf_jax.pipeline import settings
from pqf_jax.runtime import distributed, progress

PyTree = Any
# Images on which the weight of each kernel is measured.
MEASURED_IMAGES = 64


def make_plan(
  config: ml_collections.ConfigDict,
  network: contract.Network,
  template: PyTree,
  rules: Sequence[Any] | None = None,
) -> plans.CompressionPlan:
  """Returns the plan of some rules; None: those of the config.

  Without rules it is empty: `choose_rules` is for a config with bytes instead.

  Raises:
    InputError: see `settings.make_rules` and `plans.make_plan`.
  """
  if rules is None and config.target_bytes:
    return {}
  sample = tasks.get(config.task).sample(config)
  found = kernels.find_kernels(network.apply, template, *sample)
  wanted = config.rules if rules is None else rules
  return plans.make_plan(settings.make_rules(wanted), template, found)


def check_target(
  config: ml_collections.ConfigDict, network: contract.Network, template: PyTree
) -> None:
  """Refuses `config.target_bytes` that no rules can meet.

  Raises:
    InputError: names the bytes that can be met.
  """
  if config.target_bytes:
    budget.check_target(
      network.apply,
      template,
      *tasks.get(config.task).sample(config),
      target_bytes=config.target_bytes,
      storage=settings.make_storage(config),
    )


def choose_rules(
  config: ml_collections.ConfigDict,
  loaded: tasks.LoadedTask,
  dense: PyTree,
) -> list[Any]:
  """Returns the rules that lose least within `config.target_bytes`.

  Process 0 chooses for all: their sums may differ in the last bit.
  """
  found = []
  if distributed.is_lead():
    images = min(MEASURED_IMAGES, loaded.num_train)
    size = min(config.eval_batch_size, images)
    # The rules are part of a recipe, the same whatever its seed.
    batches = loaded.samples(dense, size, images // size, 0)
    found = budget.auto_rules(
      loaded.outputs,
      jax.device_get(dense),
      *batches[0],
      target_bytes=config.target_bytes,
      batches=batches,
      mask_fn=loaded.mask_fn,
      storage=settings.make_storage(config),
      kmeans_steps=config.quantize.kmeans_steps,
    )
  return distributed.gather_lists(found)


def print_plan(
  config: ml_collections.ConfigDict,
  plan: plans.CompressionPlan,
  template: PyTree,
) -> plans.SizeReport:
  """Shows what will be compressed and how large the file will be.

  Raises:
    InputError: it would be larger than `config.target_bytes`, since the rules
      were chosen for another storage.
  """
  size = plans.predict_size(plan, template, settings.make_storage(config))
  if 0 < config.target_bytes < size.payload_bytes:
    raise errors.InputError(
      f"the rules of this workdir, which were chosen for another "
      f"config.storage, make {size.payload_bytes:,} bytes, but "
      f"config.target_bytes is {config.target_bytes:,}; use another --workdir"
    )
  progress.show(report.plan_table(size.layers))
  return size
