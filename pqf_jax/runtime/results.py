"""Seals results.json, which so tells of one packed file and of no other."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from pqf_jax import errors
from pqf_jax.runtime import files

NAME = "results.json"
# The field with the digest.
SHA256 = "sha256"
# What is measured, in this order, and what tables and charts call it.
STAGES = {
  "dense": "dense",
  "permuted": "permuted",
  "quantized": "quantized",
  "calibrated": "calibrated",
  "finetuned": "fine-tuned",
  "packed": "packed",
}


def digest(results: Mapping[str, Any], packed_file: epath.Path) -> str:
  """Returns the sha256 of results and of the packed file, where it exists."""
  total = hashlib.sha256(json.dumps(results, sort_keys=True).encode())
  if packed_file.exists():
    files.check_regular(packed_file)
    total.update(packed_file.read_bytes())
  return total.hexdigest()


def beside(packed_file: epath.PathLike) -> dict[str, Any] | None:
  """Returns the results of the run that wrote this packed file.

  They are in the folder of the file; None where they are missing, are damaged
  or tell of another file.
  """
  file = files.absolute(packed_file)
  path = file.parent / NAME
  if not path.exists():
    return None
  try:
    results = files.read_json(path)
  except errors.InputError:
    return None
  stored = results.pop(SHA256, None)
  return results if stored == digest(results, file) else None
