"""Weights from the Hugging Face hub, by `hf://OWNER/REPO[/FILE]`."""

from pqf_jax import errors
from pqf_jax.runtime import progress

SCHEME = "hf://"
DEFAULT_FILE = "model.safetensors"
# Weights for research only, by repository.
NON_COMMERCIAL = {
  "timm/resnet18.fb_ssl_yfcc100m_ft_in1k": "CC-BY-NC 4.0",
  "timm/resnet18.fb_swsl_ig1b_ft_in1k": "CC-BY-NC 4.0",
  "timm/resnet50.fb_ssl_yfcc100m_ft_in1k": "CC-BY-NC 4.0",
  "timm/resnet50.fb_swsl_ig1b_ft_in1k": "CC-BY-NC 4.0",
}


def fetch(address: str) -> str:
  """Downloads a file, unless the hub's cache has it.

  What huggingface_hub reads from the environment holds, such as HF_HOME and
  HF_HUB_OFFLINE=1. A license that forbids commercial use is said.

  Args:
    address: `hf://OWNER/REPO[/FILE]`; the file is model.safetensors if not
      given.

  Returns:
    The path in the cache.

  Raises:
    InputError: not such an address; or the hub cannot be reached or does not
      have the file, and it is not cached.
  """
  owner, _, rest = address.removeprefix(SCHEME).partition("/")
  name, _, file = rest.partition("/")
  if not (address.startswith(SCHEME) and owner and name):
    raise errors.InputError(
      f"{address!r} is no address of the form {SCHEME}OWNER/REPO[/FILE], such "
      f"as {SCHEME}timm/resnet18.tv_in1k"
    )
  repo, file = f"{owner}/{name}", file or DEFAULT_FILE
  path = _download(repo, file)
  if repo in NON_COMMERCIAL:
    progress.say(
      f"{repo} is licensed under {NON_COMMERCIAL[repo]}: no commercial use, "
      "neither of its weights nor of what is made from them"
    )
  return path


def _download(repo: str, file: str) -> str:
  # Here, because loading a local file needs nothing of it.
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  try:
    return huggingface_hub.hf_hub_download(repo, file)
  except (
    OSError,
    hub_errors.EntryNotFoundError,
    hub_errors.HFValidationError,
  ) as error:
    reason = str(error).strip().partition("\n")[0]
    raise errors.InputError(
      f"cannot get {file} of https://huggingface.co/{repo}, and it is not in "
      f"the cache ({type(error).__name__}: {reason}); download it where you "
      "can and give --config.weights=FILE.safetensors"
    ) from error
