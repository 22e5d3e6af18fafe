"""Which optional dependency brings a module that is missing."""

from pqf_jax import errors

# {module: extra of pyproject.toml}, for what the core does without.
EXTRAS = {
  **dict.fromkeys(
    (
      *("absl", "array_record", "filelock", "google_crc32c", "grain"),
      *("importlib_resources", "ml_collections", "orbax", "sklearn"),
      "tensorflow_datasets",
    ),
    "train",
  ),
  **dict.fromkeys(("jinja2", "PIL", "rich"), "report"),
  "faster_coco_eval": "detection",
  "flatbuffers": "export",
  "pycocotools": "detection",
  "huggingface_hub": "hub",
  "torch": "torch",
}


def explain(error: ModuleNotFoundError) -> errors.InputError:
  """Returns the error that says how a missing module is installed.

  Raises:
    ModuleNotFoundError: this error, if the module is none of `EXTRAS`.
  """
  module = (error.name or "").partition(".")[0]
  if module not in EXTRAS:
    raise error
  return errors.InputError(
    f"this needs the module {module}, which is not installed: pip install "
    f'"pqf_jax[{EXTRAS[module]}]"'
  )
