"""The README is short, its lines are those of .ci/run, and its Python runs."""

import pathlib
import re

import jax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SETUP = re.findall(r"```sh setup\n(.*?)```", README, re.S)
(QUICKSTART,) = re.findall(r"```python\n(.*?)```", README, re.S)


def test_two_lines_set_everything_up():
  (block,) = SETUP
  job, tests = block.strip().splitlines()
  assert job.endswith("python main.py --config=configs/resnet18.py")
  assert tests.endswith("pytest -n auto")


def test_it_is_read_in_two_minutes():
  prose = re.sub(r"```.*?```", "", README, flags=re.S)
  assert len(prose.split()) <= 400


def test_the_quickstart_fine_tunes_and_packs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = {}
  short = QUICKSTART.replace(
    "target_ratio=20", "target_ratio=20, kmeans_steps=5"
  )
  # As for users, not as strict as for tests.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(short, names)
  before, _ = names["loss_fn"](
    names["result"].variables, names["batches"][0], None
  )
  assert float(names["metrics"]["loss"]) < 0.95 * float(before)
  dense = 4 * (64 * 512 + 512 + 512 * 10 + 10)
  assert (tmp_path / "model.safetensors").stat().st_size < dense / 15
  assert names["logits"].shape == (512, 10)
