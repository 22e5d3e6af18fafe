import functools
import html
import json
import os
import pkgutil
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import safetensors.numpy

import pqf_jax
from pqf_jax import errors, pack, permute, pipeline, report
from pqf_jax.models import torch_names
from pqf_jax.pipeline import results as telling
from pqf_jax.pipeline import training
from pqf_jax.runtime import files
from pqf_jax.tasks.classification import task as classification_task
from tests import bucket
from tests.pipeline import tiny


class Killed(BaseException):
  """Stands for SIGKILL: nothing catches it, nothing is written after it."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Results and packed bytes of one undisturbed run, made when first asked."""
  return {"folder": tmp_path_factory.mktemp("finished")}


def _run(config, folder):
  pipeline.run(config, str(folder))
  results = json.loads((folder / "results.json").read_text())
  return results, (folder / "model.safetensors").read_bytes()


@pytest.fixture
def undisturbed(config, finished):
  if "result" not in finished:
    finished["result"] = _run(config, finished["folder"])
  return finished["result"]


def test_results_say_what_the_file_is(config, undisturbed, finished):
  results, data = undisturbed
  file = finished["folder"] / "model.safetensors"
  assert results["file_bytes"] == os.path.getsize(file) == len(data)
  assert results["payload_bytes"] == pack.read(file).payload_bytes
  assert results["ratio"] == results["dense_bytes"] / results["file_bytes"]
  assert results["images"] == 360
  assert results["top1_permuted"] == results["top1_dense"] > 0.5
  assert results["top1_packed"] == pytest.approx(
    results["top1_finetuned"], abs=0.02
  )
  assert results["top1_finetuned"] > results["top1_quantized"] - 0.05
  assert set(results["seconds"]) == {
    "dense",
    "permuted",
    "quantized",
    "finetuned",
    "packed",
  }


def test_the_same_command_again_says_that_it_is_done(
  config, undisturbed, finished, capsys
):
  before = os.stat(finished["folder"] / "model.safetensors").st_mtime_ns
  pipeline.run(config, str(finished["folder"]))
  assert "already done" in capsys.readouterr().out
  assert os.stat(finished["folder"] / "model.safetensors").st_mtime_ns == before


# Where a run is killed, and at which of its calls; `save_progress` is called in
# training, then in fine-tuning.
KILLS = [
  ("pqf_jax.runtime.checkpoint.Checkpoints.save_progress", 3),
  ("pqf_jax.permute.permute_channels", 1),
  ("pqf_jax.quantize.quantize_params", 1),
  ("pqf_jax.runtime.checkpoint.Checkpoints.save_progress", 3),
  ("pqf_jax.pack.write", 1),
  ("pqf_jax.report.write_html", 1),
]


def test_killed_anywhere_it_goes_on_to_the_same_file(
  config, undisturbed, tmp_path, monkeypatch
):
  for target, calls in KILLS:  # each run goes on where the one before died
    module, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(module)
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, _deadly(getattr(owner, name), calls))
      with pytest.raises(Killed):
        pipeline.run(config, str(tmp_path))
  results, data = _run(config, tmp_path)
  assert data == undisturbed[1]
  assert results["top1_finetuned"] == undisturbed[0]["top1_finetuned"]
  history = (tmp_path / "metrics.jsonl").read_text().splitlines()
  places = [
    (record["stage"], record["step"], "top1" in record)
    for record in map(json.loads, history)
  ]
  assert len(places) == len(set(places)), "a resumed step was logged twice"


def _deadly(original, calls):
  """Returns the function, whose call of this number kills."""
  count = iter(range(1, calls))

  def call(*args, **kwargs):
    if next(count, None) is None:
      raise Killed
    return original(*args, **kwargs)

  return call


def test_a_bucket_holds_a_run_as_a_disk_does(
  config, undisturbed, monkeypatch, tmp_path
):
  with bucket.serve() as address, monkeypatch.context() as patch:
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    with monkeypatch.context() as killing:
      killing.setattr("pqf_jax.pipeline.stages.finetune_stage", _killed)
      with pytest.raises(Killed):
        pipeline.run(config, "gs://bucket/run")
    assert files.absolute("gs://bucket/run/checkpoints/quantize.json").exists()
    pipeline.run(config, "gs://bucket/run")
    packed = files.absolute("gs://bucket/run/model.safetensors").read_bytes()
    assert packed == undisturbed[1]
    lines = files.absolute("gs://bucket/run/metrics.jsonl").read_text()
    assert len(lines.splitlines()) > 20
    config.mode, config.weights = (
      "evaluate",
      "gs://bucket/run/model.safetensors",
    )
    pipeline.run(config, str(tmp_path))
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["top1"] == undisturbed[0]["top1_packed"]


def _killed(*arguments):
  raise Killed


def test_microbatches_follow_the_same_step(config, undisturbed, tmp_path):
  config.finetune.microbatches = 4
  results, data = _run(config, tmp_path)
  # Norms see a microbatch, so the file is another one, but hardly worse.
  assert data != undisturbed[1]
  assert results["top1_finetuned"] > results["top1_quantized"] - 0.05


def test_rates_grow_with_the_batch(config):
  config.finetune.base_batch_size = 32
  schedule = training.Schedule(config.finetune, 1280, 5)
  assert schedule.num_steps == 2 * 10
  # The batch is 128, four times what the rates are for: 1e-3 to 1e-6. Adam's
  # update of a constant gradient is the rate itself.
  optimizer = schedule.make_optimizer()
  state, rates = optimizer.init(jnp.ones(1)), []
  for _ in range(21):
    update, state = optimizer.update(jnp.ones(1), state)
    rates.append(-float(update[0]))
  np.testing.assert_allclose(rates[::20], [4e-3, 4e-6], rtol=1e-3)


@pytest.mark.parametrize(
  ("statistics", "axis"), [("batch", "data"), ("device", None)]
)
def test_norms_average_over_what_the_config_says(config, statistics, axis):
  config.norm_statistics = statistics
  apply = classification_task.training_apply(config, tiny.Tiny(10))
  assert apply.__self__.norm_axis == axis


def test_bfloat16_trains_float32_codebooks(config, tmp_path, monkeypatch):
  config.train.epochs = config.finetune.epochs = 1
  config.dtype = "bfloat16"
  seen = set()
  original = tiny.Tiny.__call__

  @functools.wraps(original)
  def spy(self, images, train=False):
    seen.add((train, str(self.dtype)))
    return original(self, images, train)

  monkeypatch.setattr(tiny.Tiny, "__call__", spy)
  pipeline.run(config, str(tmp_path))
  assert seen == {(True, "bfloat16"), (False, "None")}
  types = {leaf.dtype for leaf in _leaves(tmp_path / "checkpoints/finetune")}
  assert types == {np.dtype(name) for name in ("float32", "uint8")}


def _leaves(checkpoint):
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    return jax.tree.leaves(checkpointer.restore(checkpoint))


def test_a_workdir_of_another_config_is_refused(config, undisturbed, finished):
  config.finetune.epochs = 5
  with pytest.raises(errors.InputError, match="epochs: 2 there, 5 now"):
    pipeline.run(config, str(finished["folder"]))


def test_what_is_refused_leaves_no_workdir(config, tmp_path):
  config.weights = str(tmp_path / "missing.safetensors")
  with pytest.raises(errors.InputError, match="missing.safetensors"):
    pipeline.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_nothing_to_compress_is_said(config, tmp_path):
  config.train.epochs = 0
  with pytest.raises(errors.InputError, match="--config.weights"):
    pipeline.run(config, str(tmp_path))


def test_plan_ends_with_the_payload(config, undisturbed, capsys):
  config.mode = "plan"
  pipeline.run(config, None)
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == f"payload_bytes={undisturbed[0]['payload_bytes']}"


def test_evaluate_reads_packed_files(config, undisturbed, finished, tmp_path):
  config.mode = "evaluate"
  config.weights = str(finished["folder"] / "model.safetensors")
  pipeline.run(config, str(tmp_path))
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["top1"] == undisturbed[0]["top1_packed"]
  assert results["images"] == 360


def test_training_does_not_start_from_folded_norms(config, finished, tmp_path):
  config.train.epochs = 0
  config.weights = str(finished["folder"] / "model.safetensors")
  with pytest.raises(
    errors.InputError, match="config.weights has 2 batch norms, bn0 .*folded"
  ):
    pipeline.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_evaluate_without_weights_says_what_is_missing(config):
  config.mode = "evaluate"
  with pytest.raises(errors.InputError, match="--config.weights"):
    pipeline.run(config, None)


def test_weights_of_another_architecture_are_refused(
  config, undisturbed, finished, tmp_path
):
  config.weights = str(finished["folder"] / "model.safetensors")
  config.model.num_classes = 12
  with pytest.raises(errors.InputError, match=r"params/fc/bias is \(10,\)"):
    pipeline.run(config, str(tmp_path))


def test_classes_of_model_and_data_must_agree(config, tmp_path):
  config.model.num_classes = 12
  with pytest.raises(errors.InputError, match="12.*digits has 10"):
    pipeline.run(config, str(tmp_path))


def test_a_diverged_training_is_named(config, tmp_path):
  config.train.learning_rate = 1e30
  with pytest.raises(errors.InputError, match="train diverged"):
    pipeline.run(config, str(tmp_path))


def test_only_some_epochs_are_evaluated(config, tmp_path):
  config.mode = "train"
  config.train.evaluation_epochs = 2  # of three
  pipeline.run(config, str(tmp_path))
  log = report.read_metrics(tmp_path / "metrics.jsonl")
  evaluated = [
    record["epoch"]
    for record in log
    if record["stage"] == "train" and "top1" in record
  ]
  assert evaluated == [2, 3]


def test_compression_begins_with_the_checkpoint_of_a_training(
  config, undisturbed, tmp_path
):
  finished, packed = undisturbed
  config.mode = "train"
  pipeline.run(config, str(tmp_path / "train"))
  trained = json.loads((tmp_path / "train/results.json").read_text())
  assert trained["top1"] == finished["top1_dense"]
  shutil.copytree(
    tmp_path / "train/checkpoints", tmp_path / "other/checkpoints"
  )
  config.mode = "compress"
  results, data = _run(config, tmp_path / "other")
  assert data == packed
  assert results["seconds"]["dense"] == trained["seconds"]


def test_training_alone_refuses_weights(config, tmp_path):
  config.mode, config.weights = "train", "trained.safetensors"
  with pytest.raises(errors.InputError, match="leave it out"):
    pipeline.run(config, str(tmp_path))


def test_without_fine_tuning_the_codebooks_are_packed_as_they_are(
  config, tmp_path
):
  config.finetune.epochs = 0
  results, _ = _run(config, tmp_path)
  assert results["top1_finetuned"] == results["top1_quantized"]


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("finetune.batch_size", 5000, "5000, but there are 1437"),
    ("finetune.learning_rate", -1.0, "finetune.learning_rate is -1.0; give 0"),
    ("finetune.learning_rate", 1e-9, "finetune: learning_rate is 1e-09 and"),
    ("finetune.learning_rate", float("nan"), "learning_rate is nan; give"),
    ("train.epochs", -1, "train.epochs is -1; give 0 to"),
    ("seed", 2**63, "seed is 9223372036854775808; give 0 to 4.2"),
    ("checkpoint_steps", 0, "checkpoint_steps is 0; give 1"),
    ("eval_batch_size", -1, "eval_batch_size is -1; give 1"),
    ("permute.kmeans_steps", -1, "permute.kmeans_steps is -1; give 0"),
    ("data.image_size", -1, "data.image_size is -1; give 0"),
    ("data.std", (0.0, 1.0, 1.0), "data.std is .0.0, 1.0, 1.0.; give one"),
    ("data.mean", (float("nan"),) * 3, "data.mean is .nan"),
    ("rules", (("params/.*",),), r"rules\[0\] is .'params/.*; a rule is"),
    ("rules", (("params/.*", "x"),), "num_codes='x', channels=1"),
    ("frozen", ("(",), "config.frozen '.' is not a regular"),
    ("frozen", ("params/typo",), "frozen has 'params/typo', which matches no"),
    ("distributed", "maybe", "'maybe'; it must be one of .'auto'"),
    ("train.optimizer", "lion", "config.train: optimizer is 'lion'; it must"),
    ("finetune.momentum", 0.9, "'adam' has no momentum.*choose 'sgd'"),
    ("finetune.warmup_epochs", 2.0, "takes 22 of 22 steps"),
    ("data.unlabelled", ".", "share is 0, .* the fine-tuning loss needs"),
    ("distillation.share", 1.5, "distillation.share is 1.5; give 0 to 1"),
    ("task", "clasification", "did you mean 'classification'"),
    ("finetune.evaluation_epochs", 0, "evaluation_epochs is 0; give 1 to"),
    ("finetune.microbatches", 0, "microbatches is 0; give 1"),
    ("finetune.microbatches", 3, "128, .* in 3 microbatches; choose 126 or"),
    ("dtype", "float16", "'float16'; it must be .*'float32', 'bfloat16'"),
    ("norm_statistics", "images", "'images'; it must be .*'batch', 'device'"),
    ("pack", "latest", "'latest'; it must be one of .*'best'"),
    ("permute.search", "papers", "'papers'; it must be .*'paper', 'none'"),
  ],
)
def test_bad_settings_are_refused(config, tmp_path, name, value, message):
  config.update_from_flattened_dict({name: value})
  with pytest.raises(errors.InputError, match=message):
    pipeline.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("search", ["paper", "none"])
def test_the_search_of_the_channel_order_can_be_chosen(
  config, tmp_path, monkeypatch, search
):
  config.train.epochs = config.finetune.epochs = 1
  config.permute.search = search
  groups = []
  original = permute.permute_channels

  def spy(*args, **kwargs):
    result = original(*args, **kwargs)
    groups.extend(result[2])
    return result

  monkeypatch.setattr("pqf_jax.permute.permute_channels", spy)
  results, _ = _run(config, tmp_path)
  assert any(group.accepted for group in groups) == (search == "paper")
  assert results["top1_permuted"] == results["top1_dense"]


@pytest.fixture
def weights_files(config, tmp_path):
  """The same trained weights as a dense file of ours and with torch's names."""
  config.train.epochs, config.finetune.epochs = 3, 0
  config.rules = (("params/.*", None),)
  pipeline.run(config, str(tmp_path / "dense"))
  ours = tmp_path / "dense" / "model.safetensors"
  torch = tmp_path / "torch.safetensors"
  state_dict = torch_names.flax_to_torch(pack.load(ours))
  safetensors.numpy.save_file(state_dict, torch)
  results = json.loads((tmp_path / "dense" / "results.json").read_text())
  return (ours, torch), results["top1_packed"]


def test_evaluate_reads_dense_files_and_those_with_torchs_names(
  config, tmp_path, weights_files
):
  paths, top1 = weights_files
  config.mode = "evaluate"
  for index, file in enumerate(paths):
    config.weights = str(file)
    pipeline.run(config, str(tmp_path / f"evaluate{index}"))
    text = (tmp_path / f"evaluate{index}" / "results.json").read_text()
    assert json.loads(text)["top1"] == top1


def test_compression_starts_from_weights_without_training(
  config, tmp_path, weights_files
):
  paths, top1 = weights_files
  config.train.epochs = 0
  # As in test_workspace.py, whose k-means of weights from files is the same
  # program: that of weights trained here is another one.
  config.rules = (("params/fc/kernel", 16, 4, 10), ("params/.*", None))
  for index, file in enumerate(paths):
    config.weights = str(file)
    results, _ = _run(config, tmp_path / f"run{index}")
    assert results["top1_dense"] == top1


def test_results_tell_versions_command_and_distortion(undisturbed):
  results, _ = undisturbed
  assert results["versions"]["jax"] == jax.__version__
  assert results["versions"]["pqf_jax"] == pqf_jax.__version__
  paths = {"params/conv1/kernel", "params/fc/kernel"}
  assert results["distortion"].keys() == paths
  assert all(0 < error < 1 for error in results["distortion"].values())


def test_a_finished_run_is_found_beside_its_file(undisturbed, finished):
  found = pqf_jax.inspect(finished["folder"] / "model.safetensors")
  results, _ = undisturbed
  assert found.results == {k: results[k] for k in results if k != "sha256"}
  assert found.payload_bytes == results["payload_bytes"]


def test_top_5_of_ten_classes_is_kept_and_not_shown(undisturbed, finished):
  results, _ = undisturbed
  assert results["metrics"] == {"top1": "top-1"}
  assert results["top5_packed"] > results["top1_packed"]
  page = (finished["folder"] / "report.html").read_text()
  assert "top-1" in page.lower() and "top-5" not in page.lower()


def test_what_the_report_says_of_loading_runs(
  undisturbed, finished, monkeypatch
):
  page = (finished["folder"] / "report.html").read_text()
  snippet = re.search(r"<code>(import jax.*?)</code>", page, re.DOTALL)[1]
  names = {}
  monkeypatch.chdir(finished["folder"])
  exec(html.unescape(snippet), names)
  assert names["outputs"].shape == (1, 10)
  assert jnp.isfinite(names["outputs"]).all()


@pytest.mark.parametrize(
  ("argv", "command"),
  [
    (["main.py", "--workdir=a b"], "python main.py '--workdir=a b'"),
    (["/usr/bin/pqf-jax", "--recipe=x"], "pqf-jax --recipe=x"),
    (["/lib/pqf_jax/__main__.py", "-h"], "python -m pqf_jax -h"),
    (["/lib/other/__main__.py"], "python /lib/other/__main__.py"),
  ],
)
def test_a_command_line_is_what_one_types(argv, command):
  assert telling.command(argv) == command
