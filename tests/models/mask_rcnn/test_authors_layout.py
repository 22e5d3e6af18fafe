"""The authors' layout of a compressed Mask R-CNN, on made-up weights.

The file that the authors released was not available.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import mask_rcnn as recipe
from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.models import authors_files, mask_rcnn
from pqf_jax.pipeline import weights
from tests.models.mask_rcnn import mask_rcnn_cases as cases

DECONVOLUTION = "roi_heads.mask_predictor.conv5_mask"


def drawn(target):
  """Draws values for shapes, such as packing leaves them."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if np.issubdtype(leaf.dtype, np.integer):
      # All layers but one have 256 codewords; that one has 128.
      return jnp.asarray(rng.integers(0, 128, leaf.shape), leaf.dtype)
    name = path[-1]
    if getattr(name, "key", "") == "mean":
      return jnp.zeros(leaf.shape)
    if getattr(name, "key", "") == "var":
      return jnp.ones(leaf.shape)
    values = rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(values.astype(np.float16).astype(np.float32))

  return jax.tree_util.tree_map_with_path(draw, target)


@pytest.fixture(scope="module")
def written():
  template = cases.template(50, 91)
  plan = plans.make_plan([plans.Rule(*rule) for rule in recipe.RULES], template)
  variables = drawn(plans.compressed_shapes(plan, template))
  return template, variables, mask_rcnn.to_authors_layout(variables)


def test_it_has_the_published_size(written):
  """It is 6.645 MiB with codes of log2(K) bits."""
  _, _, state_dict = written
  size = 0
  for name, array in state_dict.items():
    if name.endswith(authors_files.CODES):
      codebook = state_dict[
        name.replace(authors_files.CODES, authors_files.CODEBOOK)
      ]
      size += array.size * int(np.log2(len(codebook))) // 8
    else:
      size += array.nbytes
  assert size == 6_967_876
  assert sum(name.endswith(authors_files.CODES) for name in state_dict) == 70


def test_what_is_written_is_read_back(written, tmp_path):
  template, variables, state_dict = written
  file = tmp_path / "mask_rcnn.safetensors"
  safetensors.numpy.save_file(state_dict, file)
  read = weights.read(str(file), "mask_rcnn", template, norm_epsilon=0.0)
  flat, expected = trees.flatten(read), trees.flatten(variables)
  assert flat.keys() == expected.keys()
  for path, array in flat.items():
    scale = path.endswith("/scale")
    np.testing.assert_allclose(array, expected[path], rtol=1e-6 * scale)


def test_the_transposed_convolution_is_cut_as_torch_has_it(written):
  """Torch has [in, out, 2, 2]: rows of one input, four taps a sub-vector."""
  _, variables, state_dict = written
  codes = state_dict[DECONVOLUTION + authors_files.CODES]
  codebook = state_dict[DECONVOLUTION + authors_files.CODEBOOK]
  weight = codebook[codes].reshape(256, 256, 2, 2)
  path = f"params/{DECONVOLUTION.replace('.', '/')}/kernel"
  node = trees.flatten(variables, vq_array.is_vq)[path]
  np.testing.assert_array_equal(
    weight.transpose(2, 3, 0, 1), node.decode().astype(np.float16)
  )


def test_what_it_cannot_hold_is_refused():
  deconvolution = vq_array.VQArray(
    jnp.zeros((4, 8)),
    jnp.zeros((3, 1), jnp.uint8),
    (2, 2, 2, 3),
    blocks.BlockSpec(2),
  )
  path = f"params/{DECONVOLUTION.replace('.', '/')}/kernel"
  with pytest.raises(errors.InputError, match="sub-vectors of 8.*one channel"):
    mask_rcnn.to_authors_layout(trees.nest({path: deconvolution}))
  bias = {"params/roi_heads/box_head/fc6_hwc/bias": jnp.zeros(3)}
  with pytest.raises(errors.InputError, match="'hwc'; use 'chw'"):
    mask_rcnn.to_authors_layout(trees.nest(bias))
