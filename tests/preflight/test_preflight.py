import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from pqf_jax import errors
from pqf_jax.preflight import (
  costs,
  gpu_compiler,
  hardware,
  preflight,
  table,
)

ROOT = pathlib.Path(__file__).parents[2]

# Shortened lines of programs compiled for v5e:2x4, and of a GPU's and a CPU's.
NAMED = """\
HloModule jit_step, is_scheduled=true, num_partitions=8
%region (a: f32[], b: f32[]) -> f32[] {
}
ENTRY %main {
  %all-reduce.7 = (f32[64]{0:T(128)S(1)}, /*index=1*/f32[7,7,3,64]{3,1,2,0:T(8,\
128)S(1)}, f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=2, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%region, \
metadata={op_name="jit(step)/all-gather(x)/reduce_sum"}
  %half = bf16[10]{0} all-reduce(%d), replica_groups=mesh['x'=2,'y'=4] {'y'}
  ROOT %gte = f32[64]{0} get-tuple-element(%all-reduce.7), index=0
}
"""
HALVES = """\
HloModule jit_f, num_partitions=6
  %ag-start = (f32[4]{0}, f32[12]{0}) all-gather-start(f32[4]{0} %p), \
replica_groups=[2,3]<=[6], dimensions={0}
  %ag-done = f32[12]{0} all-gather-done((f32[4]{0}, f32[12]{0}) %ag-start)
  %rs = s8[5]{0} reduce-scatter(%q), replica_groups={{0,1,2},{3,4,5}}
  %cp = pred[100]{0} collective-permute(%r), source_target_pairs={{0,1}}
  %everybody = c64[2,3]{1,0} all-to-all(%r), replica_groups={}
"""


def test_all_reduces_of_a_tpu_with_their_shapes_and_groups():
  first, second = costs.find_collectives(NAMED)
  weights = 64 + 7 * 7 * 3 * 64 + 1
  assert first == costs.Collective("all-reduce", 4 * weights, 8)
  assert second == costs.Collective("all-reduce", 20, 4)


def test_an_awaited_collective_counts_once_and_all_notations_are_read():
  assert costs.find_collectives(
    HALVES.replace("%ag-done", "ROOT %ag-done")
  ) == [
    costs.Collective("all-gather", 48, 3),
    costs.Collective("reduce-scatter", 5, 3),
    costs.Collective("collective-permute", 100, 6),
    costs.Collective("all-to-all", 48, 6),
  ]


@pytest.mark.parametrize(
  ("kind", "sent"),
  # A ring of 4 with 1200 bytes of result, counted by hand: a chip sends a
  # quarter in each of 3 steps, for an all-reduce in 6.
  [
    ("all-reduce", 1800),
    ("all-gather", 900),
    ("reduce-scatter", 3600),
    ("all-to-all", 900),
    ("collective-permute", 1200),
  ],
)
def test_what_a_ring_sends(kind, sent):
  assert costs.Collective(kind, 1200, 4).sent_bytes == sent


def test_the_roofline_is_the_slowest_of_three():
  target = hardware.parse("v5e:2x4")
  exchange = costs.Collective("all-reduce", 800_000_000, 8)
  cost = costs.Cost(1e9, 197e9, 819e7, (exchange,))
  line = costs.roofline(cost, target)
  assert line.flops == pytest.approx(1e-3)
  assert line.hbm == pytest.approx(10e-3)
  assert line.links == pytest.approx(7e-3)  # 1.4 GB at 200 GB/s
  assert line.seconds == line.hbm
  assert line.bound == "hbm"
  on_gpu = costs.roofline(cost, hardware.parse("h100:8"), dtype="float32")
  assert on_gpu.flops == pytest.approx(197e9 / 495e12)


def test_gpus_beyond_one_box_use_the_network():
  assert (
    hardware.parse("h100:8").bandwidth > 5 * hardware.parse("h100:16").bandwidth
  )


@pytest.mark.parametrize(
  "topology",
  ["", "v5e", "v5e:2x4x2", "v5p:2x2", "v9:2x4", "h100:2x4", "v5e:0x4"],
)
def test_unknown_topologies_are_told_the_known_ones(topology):
  with pytest.raises(errors.InputError, match=r"known are.*v5e:2x4.*h100:8"):
    hardware.parse(topology)


def test_a_slice_has_its_limits():
  with pytest.raises(errors.InputError, match="1024 chips.*at most 256"):
    hardware.parse("v6e:32x32")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.InputError, match=r"pip install \"?libtpu"):
    hardware.open_devices(hardware.parse("v5e:2x4"))


def test_the_bytes_that_a_refusal_states():
  told = (
    "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries "
    "(75.50G) exceeds available HBM (15.75G)"
  )
  assert costs.needed_bytes(told) == 75.5 * 2**30
  assert costs.needed_bytes("out of memory") == 0


def _run(code, environment):
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=200,
  )


def _python(code):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
  }
  done = _run(code, environment)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_the_collective_of_a_compiled_program():
  # A product over rows that 8 devices share is summed by one all-reduce.
  told = _python(
    "import jax, jax.numpy as jnp\n"
    "from pqf_jax.runtime import distributed\n"
    "from pqf_jax.preflight import costs\n"
    "rows = distributed.sharded()\n"
    "x = jax.ShapeDtypeStruct((64, 5), jnp.float32, sharding=rows)\n"
    "f = jax.jit(lambda x: x.T @ x, out_shardings=distributed.replicated())\n"
    "cost = costs.measure(f.lower(x).compile())\n"
    "print(*[tuple(c) for c in cost.collectives])\n"
    "print(cost.sent_bytes, cost.flops)\n"
  )
  assert told[0] == "('all-reduce', 100, 8)"
  sent, flops = map(float, told[1].split())
  assert sent == 2 * 100 * 7 / 8
  # 8 rows a device: 2 * 8 * 5 * 5, and perhaps a few of the sum.
  assert 400 <= flops <= 500


def _preflight(*settings, before=""):
  code = (
    "import sys\n"
    "from tests.pipeline import tiny\n"
    f"sys.argv = ['tiny', '-', 'mode=preflight', *{settings!r}]\n"
    f"{before}\n"
    "tiny.main()\n"
  )
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = _run(code, environment)
  return done.returncode, done.stdout + done.stderr


def test_a_recipe_on_gpus_that_are_not_there():
  code, told = _preflight(
    "topology=h100:8",
    before="from pqf_jax.preflight import gpu_compiler\n"
    "gpu_compiler.is_installed = lambda: False",
  )
  assert code == 0, told
  assert "everything fits" in told
  assert "Memory is an estimate" in told
  assert re.search(r"input +128 \(16 a chip\) +256 \(32 a chip\)", told), told
  # The best five of logits that devices share are found where all of them are.
  row = r"collectives +5 all-reduce +1 all-gather, 1 +none"
  assert re.search(row, told), told


def test_the_compiler_of_gpus_needs_none():
  pytest.importorskip(gpu_compiler.PLUGIN)
  code, told = _preflight("topology=h100:8")
  assert code == 0, told
  assert "memory and collectives are by the GPU's own" in told
  row = re.search(r"collectives +(\d+) all-reduce +1 all-reduce", told)
  assert row, told
  flops = re.search(r"FLOPs +(\S+)", told)
  assert float(flops[1]) > 0, told


def test_where_the_compiler_of_gpus_is_missing_the_note_says_how_to_get_it():
  host = jax.devices("cpu")[:1]
  (estimate, _) = table.notes(
    hardware.parse("h100:1"), hardware.Devices(host, host)
  )
  assert f"jax-cuda13-pjrt=={jax.__version__}" in estimate


def test_a_batch_that_the_devices_cannot_share():
  code, told = _preflight("topology=h100:8", "finetune.batch_size=12")
  assert code == 2
  assert "config.finetune.batch_size is 12, which 8 devices cannot" in told


@pytest.mark.parametrize(("limit", "offset"), [(400, 0), (997, 90), (250, 200)])
def test_the_search_for_the_largest_batch(limit, offset):
  """Memory of 10 a image on a chip, more for few images than a line has."""
  tried = []

  def needed(batch):
    tried.append(batch)
    return 10 * batch / 2 + (offset if batch else 0)

  fits, fails = preflight.search_largest(
    needed, 256, needed(256), limit=limit, least=20, unit=2
  )
  assert needed(fits) <= limit < needed(fails)
  assert fails - fits == 2
  assert len(tried) <= 3 + preflight.MOST_COMPILATIONS


def test_a_refusal_without_a_size_is_halved():
  fits, fails = preflight.search_largest(
    lambda batch: 1.0 if batch <= 40 else 0.0,
    64,
    0.0,
    limit=5.0,
    least=0.5,
    unit=8,
  )
  assert (fits, fails) == (40, 48)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_refused_by_the_largest_that_does():
  small = (
    "from pqf_jax.preflight import hardware\n"
    "hardware.CHIPS['h100'] = hardware.CHIPS['h100']._replace(hbm_bytes=400e3)"
  )
  code, told = _preflight(
    "topology=h100:2", "finetune.batch_size=512", before=small
  )
  assert code == 2, told
  match = re.search(
    r"config\.finetune\.batch_size=512 needs .* a chip, where a chip of "
    r"h100:2 has 400 kB; (?:the largest that fits is )?(\d+)",
    " ".join(told.split()),
  )
  assert match, told
  largest = int(match[1])
  assert 0 < largest < 512
  # What it names does fit; eval batches are then the next to be refused.
  _, told = _preflight(
    "topology=h100:2", f"finetune.batch_size={largest}", before=small
  )
  assert "config.finetune.batch_size" not in told


@pytest.mark.slow
def test_the_compiler_of_tpus_agrees():
  pytest.importorskip("libtpu")
  code, told = _preflight("topology=v5e:2x4")
  assert code == 0, told
  assert "Memory is an estimate" not in told
  assert "everything fits" in told
