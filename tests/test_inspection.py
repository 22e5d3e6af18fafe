"""Inside a packed file: NumPy and SciPy count what `inspect` says."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import pqf_jax
from pqf_jax import errors, extras, inspection, report
from pqf_jax.core import plan as plans
from pqf_jax.runtime import results as sealing
from tests.report.test_html import Page

ROOT = pathlib.Path(__file__).parents[1]
CONV, FC, STACK = (f"params/{name}/kernel" for name in ("conv", "fc", "stack"))
# {path: (dense shape of one layer, spec, K, stacked layers)}
KERNELS = {
  CONV: ((3, 3, 4, 16), pqf_jax.BlockSpec(2), 8, ()),
  FC: ((16, 10), pqf_jax.BlockSpec(4), 4, ()),
  STACK: ((6, 10), pqf_jax.BlockSpec(3, stack_axes=(1,)), 5, (3,)),
}


def kernel(shape, spec, num_codes, stack):
  """A kernel whose codes are far from uniform, and one of them unused."""
  rng = np.random.default_rng(num_codes)
  c_out, m, length = spec.layout(shape)
  shares = rng.dirichlet(np.ones(num_codes - 1))
  codes = rng.choice(num_codes - 1, (*stack, c_out, m), p=shares)
  codebook = rng.normal(size=(*stack, num_codes, length)).astype(np.float16)
  if stack:
    codes, codebook = (np.moveaxis(x, 0, 1) for x in (codes, codebook))
  return pqf_jax.VQArray(
    codebook.astype(np.float32), codes.astype(np.uint8), shape, spec
  )


@pytest.fixture(scope="module")
def variables():
  tree = {"params": {}, "batch_stats": {}}
  for path, fields in KERNELS.items():
    tree["params"][path.split("/")[1]] = {"kernel": kernel(*fields)}
  ones = np.ones(16, np.float32)
  tree["params"]["bn"] = {"scale": ones, "bias": ones}
  tree["batch_stats"]["bn"] = {"mean": ones, "var": ones}
  tree["params"]["fc"]["bias"] = np.zeros(10, np.float32)
  tree["params"]["none"] = np.zeros((0, 4), np.float32)
  return tree


STORAGES = [
  pqf_jax.Storage(codebook, rest)
  for codebook in ("float16", "int8")
  for rest in ("float32", "float16")
]


@pytest.fixture(scope="module")
def file(variables, tmp_path_factory):
  path = tmp_path_factory.mktemp("packed") / "model.safetensors"
  pqf_jax.save(path, variables, norm_epsilon=1e-3, architecture={"name": "own"})
  return path


@pytest.fixture
def run(file, tmp_path):
  """A copy of the file in a workdir, with the results of its run."""
  copy = tmp_path / "model.safetensors"
  shutil.copy(file, copy)
  results = {
    "command": "python main.py --config=own.py",
    "versions": {"jax": "1.2.3"},
    "date": "2001-02-03",
    "device": "cpu",
    "metrics": {"top1": "top-1"},
    "top1_dense": 0.875,
    "top1_finetuned": 0.8125,
    "top5_dense": 0.9999,
    "distortion": {CONV: 0.1234, FC: 0.25},
  }
  write(copy, results, sealing.digest(results, copy))
  return copy


def write(file, results, digest):
  sealed = results | {sealing.SHA256: digest}
  (file.parent / "results.json").write_text(json.dumps(sealed))


def test_uses_and_entropy_are_those_of_the_codes(variables, file):
  found = {k.size.path: k for k in pqf_jax.inspect(file).kernels}
  assert found.keys() == KERNELS.keys()
  for path, (shape, spec, num_codes, stack) in KERNELS.items():
    node = variables["params"][path.split("/")[1]]["kernel"]
    codes, codebooks = (
      np.moveaxis(x, 1, 0) if stack else x[None]
      for x in map(np.asarray, (node.codes, node.codebook))
    )
    codes = codes.reshape(len(codes), -1)
    uses = [[np.sum(row == k) for k in range(num_codes)] for row in codes]
    np.testing.assert_array_equal(found[path].uses, uses)
    assert found[path].used == sum(len(np.unique(row)) for row in codes)
    assert found[path].used < found[path].uses.size
    entropy = np.mean([scipy.stats.entropy(row, base=2) for row in uses])
    assert found[path].entropy == pytest.approx(entropy)
    np.testing.assert_array_equal(found[path].codebooks, codebooks)
    assert found[path].channels == spec.channels
    assert found[path].taps == shape[:-2]


def test_a_kernel_of_one_codeword_has_no_entropy(tmp_path):
  codes = np.full((4, 1), 1, np.uint8)
  node = pqf_jax.VQArray(
    np.eye(2, dtype=np.float32), codes, (2, 4), pqf_jax.BlockSpec(2)
  )
  pqf_jax.save(tmp_path / "one", {"kernel": node})
  (only,) = pqf_jax.inspect(tmp_path / "one").kernels
  assert (only.used, str(only.entropy)) == (1, "0.0")


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_sizes_are_those_that_were_predicted(variables, tmp_path, storage):
  path = tmp_path / "model.safetensors"
  packed = pqf_jax.save(path, variables, norm_epsilon=1e-3, storage=storage)
  plan = {
    path: plans.LayerPlan(spec, num_codes, 1)
    for path, (_, spec, num_codes, _) in KERNELS.items()
  }
  predicted = pqf_jax.predict_size(plan, variables, storage)
  found = pqf_jax.inspect(path)
  assert found.variables == tuple(sorted(predicted.layers))
  assert found.payload_bytes == packed.payload_bytes == predicted.payload_bytes
  assert found.dense_bytes == predicted.dense_bytes
  assert found.file_bytes == path.stat().st_size
  assert found.storage == {"codebook": storage.codebook, "rest": storage.rest}
  assert found.norm_epsilon == {"bn": 1e-3}


@pytest.mark.parametrize("version", [2, 3])
def test_files_of_every_format_are_inspected(version):
  path = ROOT / f"tests/goldens/packed_format{version}.safetensors"
  found = pqf_jax.inspect(path)
  assert found.format == version
  assert found.payload_bytes == pqf_jax.pack.read(path).payload_bytes
  assert found.kernels
  assert str(found)


def test_a_file_without_compressed_kernels_and_an_empty_one(tmp_path):
  for tree in ({"bias": np.ones(3, np.float32)}, {}):
    pqf_jax.save(tmp_path / "file", tree)
    found = pqf_jax.inspect(tmp_path / "file")
    assert not found.kernels
    assert "total" in str(found)
    report.write_inspection(tmp_path / "page.html", found)
    Page((tmp_path / "page.html").read_text())


def test_results_count_where_they_are_of_this_very_file(run):
  found = pqf_jax.inspect(run)
  assert found.distortion == {CONV: 0.1234, FC: 0.25}
  told = str(found)
  for figure in (
    *("top-1: dense 87.50 %, fine-tuned 81.25 %", "12.34 %", "jax 1.2.3"),
    *("command: python main.py --config=own.py", "device: cpu"),
  ):
    assert figure in told
  assert "99.99" not in told


@pytest.mark.parametrize("change", ["file", "results", "damage", "folder"])
def test_results_of_another_file_do_not_count(run, variables, change):
  path = run.parent / "results.json"
  if change == "file":
    pqf_jax.save(run, variables, norm_epsilon=1e-2)
  elif change == "results":
    path.write_text(path.read_text().replace("0.875", "0.975"))
  elif change == "damage":
    path.write_text(path.read_text()[:50])
  else:
    path.unlink()
    path.mkdir()
  found = pqf_jax.inspect(run)
  assert found.results is None
  assert found.distortion == {}
  assert "distortion" not in str(found)


def test_bad_files_are_refused_as_load_refuses_them(file, tmp_path):
  damaged = bytearray(file.read_bytes())
  damaged[-1] ^= 1
  (tmp_path / "damaged").write_bytes(damaged)
  for path in (tmp_path / "damaged", tmp_path / "none", tmp_path):
    with pytest.raises(errors.InputError) as loading:
      pqf_jax.load(path)
    with pytest.raises(errors.InputError) as inspecting:
      pqf_jax.inspect(path)
    assert str(inspecting.value) == str(loading.value)


def test_the_table_is_aligned_and_names_cannot_move_a_cursor(tmp_path):
  node = kernel(*KERNELS[FC])
  pqf_jax.save(tmp_path / "file", {"a\x1b[2J\nb": node, "c": node})
  lines = str(pqf_jax.inspect(tmp_path / "file")).splitlines()
  start = next(n for n, line in enumerate(lines) if line.startswith("kernel"))
  table = lines[start : start + 5]
  assert r"a\x1b[2J\nb" in table[1]
  assert len({len(line) for line in table[:3]}) == 1
  assert all(line.isprintable() for line in lines)


def test_the_page_shows_all_of_it(run, tmp_path):
  found = pqf_jax.inspect(run)
  report.write_inspection(tmp_path / "page.html", found)
  page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
  figures = ["87.50 %", "81.25 %", "12.34 %", "jax", "1.2.3", '"name": "own"']
  figures += ["python main.py --config=own.py", "format 3", "norm epsilon"]
  for one in found.kernels:
    figures += [f"{one.used}/{one.uses.size}", f"{one.entropy:.2f}"]
    figures += [f"{one.size.payload_bytes:,}", one.size.path]
  assert [figure for figure in figures if figure not in page.text] == []
  pictures = {
    src.removeprefix("data:image/png;base64,") for src in page.attributes["src"]
  }
  assert len(pictures) == len(found.kernels)
  for picture in pictures:
    Image.open(io.BytesIO(base64.b64decode(picture))).verify()
  assert not page.tags & {"script", "link"}


def test_the_page_escapes_names_and_folds_large_codebooks(tmp_path):
  hostile = "</style><script>alert(1)</script>"
  shape = (1, 1200)
  codes = np.arange(1200, dtype=np.uint16)[:, None]
  codebook = np.ones((1200, 1), np.float32)
  node = pqf_jax.VQArray(codebook, codes, shape, pqf_jax.BlockSpec(1))
  pqf_jax.save(
    tmp_path / "file", {hostile: node}, architecture={hostile: hostile}
  )
  found = pqf_jax.inspect(tmp_path / "file")
  report.write_inspection(tmp_path / "page.html", found)
  page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
  assert "script" not in page.tags
  assert "the 1,024 most frequent" in page.text


def command(*arguments, without=()):
  """Runs the command line as if some libraries were not installed."""
  code = "import sys\n"
  code += "".join(f"sys.modules[{name!r}] = None\n" for name in without)
  code += "from pqf_jax import __main__\n__main__.main()\n"
  return subprocess.run(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_needs_the_core_alone(run, tmp_path):
  # flax brings the others.
  without = {*extras.EXTRAS} - {"absl", "importlib_resources", "orbax", "rich"}
  done = command("inspect", run, without=without)
  assert done.stdout == f"{pqf_jax.inspect(run)}\n", done.stderr
  page = tmp_path / "page.html"
  done = command("inspect", run, "--html", page, without={"jinja2"})
  assert done.returncode == 2
  assert 'pip install "pqf_jax[report]"' in done.stderr
  assert not page.exists()


def test_the_command_writes_the_page_and_never_over_the_file(
  run, tmp_path, capsys, monkeypatch
):
  from pqf_jax import __main__

  def main(*arguments):
    monkeypatch.setattr(sys, "argv", ["pqf-jax", *map(str, arguments)])
    __main__.main()
    return capsys.readouterr().out

  page = tmp_path / "page.html"
  out = main("inspect", run, "--html", page)
  assert out.endswith(f"written: {page}\n")
  assert page.exists()
  before = run.read_bytes()
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  for arguments in (
    (run, "--html", run.parent / "." / run.name),
    (run, "--html", pipe),
    (run, "--html", tmp_path),
    (tmp_path / "none",),
  ):
    with pytest.raises(SystemExit) as stopped:
      main("inspect", *arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", told)
  assert run.read_bytes() == before
  assert pipe.is_fifo()
  assert isinstance(pqf_jax.inspect(run), inspection.Inspection)
