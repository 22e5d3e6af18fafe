import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.models import mobilenet_v2
from tests.models import quick
from tests.oracles import mobile_weights, resnet_weights


@functools.cache
def shapes(num_classes):
  init = mobilenet_v2.make(num_classes=num_classes).init
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_paths_are_torchvisions_names_with_slashes():
  flat = trees.flatten(shapes(num_classes=10))
  assert flat["params/features/0/0/kernel"].shape == (3, 3, 3, 32)
  assert flat["params/features/1/conv/0/0/kernel"].shape == (3, 3, 1, 32)
  assert flat["params/features/2/conv/1/0/kernel"].shape == (3, 3, 1, 96)
  assert flat["params/features/2/conv/2/kernel"].shape == (1, 1, 96, 24)
  assert flat["params/features/2/conv/3/scale"].shape == (24,)
  assert flat["batch_stats/features/18/1/var"].shape == (1280,)
  assert flat["params/classifier/1/kernel"].shape == (1280, 10)


def test_files_with_timms_names_are_read_as_those_with_torchvisions():
  # Both networks define their layers in the same order.
  template = shapes(num_classes=mobile_weights.NUM_CLASSES)
  theirs = resnet_weights.draw(mobile_weights.mobilenet_v2())
  names = mobile_weights.mobilenet_v2_of_timm()
  assert list(names.values()) == [array.shape for array in theirs.values()]
  timms = dict(zip(names, theirs.values(), strict=True))
  jax.tree.map(
    np.testing.assert_array_equal,
    mobilenet_v2.load_torch(timms, template),
    mobilenet_v2.load_torch(theirs, template),
  )


@pytest.mark.parametrize(
  ("channels", "payload_bytes"), [(4, 1_172_460), (8, 951_420)]
)
def test_rules_of_the_authors_give_their_sizes(channels, payload_bytes):
  # All but the stem compressed, the classifier with blocks of 4 either way.
  rules = [
    plans.Rule("params/features/0/0/kernel", None),
    plans.Rule("params/classifier/1/kernel", 1024, 4),
    plans.Rule("params/features/1/conv/0/0/kernel", 256, 1),
    plans.Rule("params/features/.*/conv/1/0/kernel", 256, 1),
    plans.Rule(".*/kernel", 256, channels),
  ]
  template = shapes(num_classes=1000)
  size = plans.predict_size(plans.make_plan(rules, template), template)
  assert size.payload_bytes == payload_bytes
  dense = {row.path for row in size.layers if len(row.shape) > 1 > row.length}
  assert dense == {"params/features/0/0/kernel"}


def test_compressed_depthwise_kernels_need_no_code_of_their_own():
  model = mobilenet_v2.make(num_classes=mobile_weights.NUM_CLASSES)
  images = jnp.asarray(resnet_weights.images(2, 16, 13, 3), jnp.float32)
  variables = mobilenet_v2.load_torch(
    resnet_weights.draw(mobile_weights.mobilenet_v2()),
    shapes(num_classes=mobile_weights.NUM_CLASSES),
  )
  rng = np.random.default_rng(0)
  spec = blocks.BlockSpec(1)
  nodes = {}
  for path, leaf in trees.flatten(variables).items():
    if path.endswith("kernel") and leaf.shape[:3] == (3, 3, 1):
      codebook = rng.normal(0, 0.3, (8, 9)).astype(np.float32)
      codes = rng.integers(0, 8, (leaf.shape[-1], 1)).astype(np.uint8)
      node = vq_array.VQArray(
        jnp.asarray(codebook), jnp.asarray(codes), leaf.shape, spec
      )
      nodes[path] = node
      np.testing.assert_array_equal(
        node.decode()[..., 0, 5].ravel(), codebook[codes[5, 0]]
      )
  assert len(nodes) == 17
  compressed = trees.replace(variables, nodes)
  apply = quick.jit(model.apply)
  logits = apply(compressed, images)
  expected = apply(vq_array.decode_params(compressed), images)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
  assert float(jnp.abs(logits - apply(variables, images)).max()) > 1e-2
