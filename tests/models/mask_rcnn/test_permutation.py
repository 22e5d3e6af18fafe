"""Channel groups, plan and compressed kernels of the whole inference."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.core import blocks, channels, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover
from pqf_jax.models import mask_rcnn
from pqf_jax.models.mask_rcnn import network, roi_heads
from tests.models import quick
from tests.models.mask_rcnn import mask_rcnn_cases as cases
from tests.oracles import mask_rcnn_weights, resnet_weights

# The paper's: section 4.3 of arXiv 2010.15703 and its released configuration.
RULES = (
  plans.Rule("params/backbone/body/conv1/kernel", None),
  plans.Rule("params/rpn/head/(cls_logits|bbox_pred)/kernel", None),
  plans.Rule("params/roi_heads/mask_predictor/mask_fcn_logits/kernel", None),
  plans.Rule("params/backbone/body/layer1/0/conv1/kernel", 128, channels=4),
  plans.Rule("params/roi_heads/box_head/fc6/kernel", 256, channels=16),
  plans.Rule(
    "params/(.*/(conv2|conv5_mask|mask_fcn.)|rpn/.*|.*/layer_blocks/.)/kernel",
    256,
  ),
  plans.Rule("params/.*/kernel", 256, channels=4),
)
# The authors' list lacks these.
PAIR = [
  {
    "parents": ["roi_heads.mask_head.mask_fcn4"],
    "children": ["roi_heads.mask_predictor.conv5_mask"],
  },
  {
    "parents": ["roi_heads.mask_predictor.conv5_mask"],
    "children": ["roi_heads.mask_predictor.mask_fcn_logits"],
  },
]


def coco_template():
  """Returns the shapes of the variables of the network for COCO."""
  return cases.template(50, 91)


@functools.cache
def full_axes():
  """Returns the channel axes of the network for COCO."""
  case = mask_rcnn_weights.DEEP
  model = cases.make(case, jnp.float32)
  images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
  return discover.infer_channels(model.apply, coco_template(), images, sizes)


def by_group(axes):
  """Returns {group: {(path, dim, outer, inner), ...}}."""
  groups = {}
  for path, row in axes.items():
    for dim, axis in enumerate(row):
      if axis is not None:
        place = (path, dim, axis.outer, axis.inner)
        groups.setdefault(axis.group, set()).add(place)
  return groups


def listed_group(group, flat):
  """Returns the places of a group that is written in the authors' terms."""
  places = set()
  for parent in group["parents"]:
    name = parent.replace(".", "/")
    for path in (
      *(f"params/{name}/{entry}" for entry in ("kernel", "bias", "scale")),
      *(f"batch_stats/{name}/{entry}" for entry in ("mean", "var")),
    ):
      if path in flat:
        places.add((path, len(flat[path].shape) - 1, 1, 1))
  for child in group["children"]:
    path = f"params/{child.replace('.', '/')}/kernel"
    taps = 49 if child.endswith("fc6") else 1
    places.add((path, len(flat[path].shape) - 2, 1, taps))
  return frozenset(places)


def test_discovery_finds_47_groups_and_leaves_no_free_axis_out():
  axes = full_axes()
  assert len(by_group(axes)) == 47
  covered = {place[:2] for group in by_group(axes).values() for place in group}
  kernels = {
    (path, dim)
    for path, leaf in trees.flatten(coco_template()).items()
    if path.endswith("kernel")
    for dim in (len(leaf.shape) - 2, len(leaf.shape) - 1)
  }
  outputs = ("cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits")
  fixed = {("params/backbone/body/conv1/kernel", 2)} | {
    (path, dim)
    for path, dim in kernels
    if path.endswith(tuple(f"{name}/kernel" for name in outputs))
    and dim == len(trees.flatten(coco_template())[path].shape) - 1
  }
  assert kernels - covered == fixed


def test_discovery_finds_the_authors_groups_and_the_pair_they_lack(shared_data):
  axes = full_axes()
  path = shared_data / "pqf_official" / "permutation_groups.json"
  groups = json.loads(path.read_text())["maskrcnn"] + PAIR
  flat = trees.flatten(coco_template())
  listed = {listed_group(group, flat) for group in groups}
  assert {frozenset(group) for group in by_group(axes).values()} == listed


def test_the_papers_plan_has_the_papers_size():
  plan = plans.make_plan(RULES, coco_template())
  size = plans.predict_size(plan, coco_template())
  assert len(plan) == 70
  assert round(size.payload_bytes / 2**20, 3) == 6.645
  assert round(size.dense_bytes / 2**20, 1) == 169.6
  assert round(size.ratio, 1) == 25.5


@pytest.fixture(scope="module")
def small():
  """Returns (detect, variables, channel axes, detections), compiled once."""
  case = mask_rcnn_weights.SMALL._replace(
    min_size=64, max_size=96, num_proposals=30, num_detections=8
  )
  with cases.double():
    model = cases.make(case)
    images, sizes = mask_rcnn_weights.batch([(60, 80)], 80)
    # NumPy's, which permute without compiling anything, in half the memory.
    variables = jax.device_get(cases.variables(case, jnp.float32))
    axes = discover.infer_channels(model.apply, variables, images, sizes)

    @quick.jit
    def run(variables):
      wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
      return model.apply(wide, images, sizes)

    def detect(variables):
      with cases.double():
        return jax.device_get(run(variables))

    yield detect, variables, axes, detect(variables)


def permuted(variables, axes, chosen=None):
  rng = np.random.default_rng(0)
  sizes = channels.group_sizes(variables, axes)
  drawn = {group: rng.permutation(size) for group, size in sizes.items()}
  if chosen is not None:
    drawn = {group: drawn[group] for group in chosen}
  with cases.double():
    return channels.apply_permutations(variables, axes, drawn)


def test_permuting_all_groups_at_random_leaves_the_detections(small):
  detect, variables, axes, before = small
  assert before.valid.all()
  masks = before.masks[before.valid]
  assert (masks.max((1, 2)) - masks.min((1, 2)) > 0.1).all()
  after = detect(permuted(variables, axes))
  np.testing.assert_array_equal(after.labels, before.labels)
  for name in ("boxes", "scores", "masks"):
    np.testing.assert_allclose(
      getattr(after, name), getattr(before, name), rtol=0, atol=1e-8
    )


def test_a_forgotten_member_changes_the_detections(small):
  detect, variables, axes, before = small
  for path in (
    "params/backbone/fpn/inner_blocks/0/kernel",
    "params/roi_heads/mask_predictor/conv5_mask/kernel",
  ):
    short = {name: row for name, row in axes.items() if name != path}
    after = detect(permuted(variables, short))
    changed = max(
      np.abs(after.boxes - before.boxes).max(),
      np.abs(after.masks - before.masks).max(),
    )
    assert changed > 0.01


def test_swapped_axes_of_the_transposed_convolution_change_the_masks(small):
  detect, variables, axes, before = small
  path = "params/roi_heads/mask_predictor/conv5_mask/kernel"
  row = axes[path]
  wrong = {**axes, path: (*row[:2], row[3], row[2])}
  after = detect(permuted(variables, wrong))
  np.testing.assert_allclose(after.boxes, before.boxes, rtol=0, atol=1e-8)
  assert np.abs(after.masks - before.masks).max() > 0.01


def compressed(leaf, channels):
  spec = blocks.BlockSpec(channels)
  rng = np.random.default_rng(0)
  c_out, m, size = spec.layout(leaf.shape)
  codebook = rng.normal(0, 0.05, (16, size)).astype(np.float32)
  codes = rng.integers(0, 16, (c_out, m)).astype(np.uint8)
  return vq_array.VQArray(
    jnp.asarray(codebook), jnp.asarray(codes), leaf.shape, spec
  )


def test_heads_read_compressed_kernels_as_they_are():
  heads = roi_heads.RoIHeads(3, "fc6", 32, 16, jnp.float32)
  rng = np.random.default_rng(0)
  boxes = jnp.asarray(rng.normal(size=(4, 7, 7, 16)), jnp.float32)
  masks = jnp.asarray(rng.normal(size=(4, 14, 14, 16)), jnp.float32)
  labels = jnp.asarray([0, 1, 2, 1], jnp.int32)

  def run(heads, boxes, masks, labels):
    return *heads.classify(boxes), heads.segment(masks, labels)

  arguments = boxes, masks, labels
  init = functools.partial(heads.init, method=run)
  apply = quick.jit(functools.partial(heads.apply, method=run))
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype),
    jax.eval_shape(init, jax.random.key(0), *arguments),
  )
  plan = {"fc6": 16, "fc7": 4, "cls_score": 4, "conv5_mask": 1, "mask_fcn2": 1}
  nodes = {
    path: compressed(leaf, plan[path.split("/")[-2]])
    for path, leaf in trees.flatten(variables).items()
    if path.split("/")[-2] in plan and path.endswith("kernel")
  }
  assert len(nodes) == len(plan)
  small = trees.replace(variables, nodes)
  dense = vq_array.decode_params(small)
  before = apply(variables, *arguments)
  outputs = apply(small, *arguments)
  expected = apply(dense, *arguments)
  for one, other, dense_one in zip(outputs, expected, before, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.abs(one - dense_one).max() > 1e-3


# A box head of 32 channels and 64 outputs, instead of 256 and 1,024.
CHANNELS, OUTPUTS = 32, 64


def box_head(first):
  """Returns (weights with torch's names, template) of a small box head."""
  name = "roi_heads.box_head"
  inputs = {"fc6": CHANNELS * 49, "fc7": OUTPUTS}
  weights = {}
  for layer, size in inputs.items():
    weights[f"{name}.{layer}.weight"] = (OUTPUTS, size)
    weights[f"{name}.{layer}.bias"] = (OUTPUTS,)
  head = roi_heads.BoxHead(first, OUTPUTS, jnp.float32)
  pooled = jax.ShapeDtypeStruct((1, 7, 7, CHANNELS), jnp.float32)
  shapes = jax.eval_shape(head.init, jax.random.key(0), pooled)
  template = {"params": {"roi_heads": {"box_head": shapes["params"]}}}
  return resnet_weights.draw(weights), template


def test_a_block_of_fc6_is_16_consecutive_weights_of_torchs():
  weights, template = box_head("fc6")
  variables = mask_rcnn.load_torch(weights, template)
  kernel = variables["params"]["roi_heads"]["box_head"]["fc6"]["kernel"]
  sub_vectors = blocks.BlockSpec(16).to_blocks(kernel)
  torchs = weights["roi_heads.box_head.fc6.weight"].reshape(OUTPUTS, -1, 16)
  np.testing.assert_allclose(sub_vectors, torchs, rtol=1e-6)


def test_the_whole_network_takes_a_compressed_tree():
  case = mask_rcnn_weights.DEEP
  model = cases.make(case, jnp.float32)
  images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
  tree = plans.compressed_shapes(
    plans.make_plan(RULES, coco_template()), coco_template()
  )
  detections = jax.eval_shape(model.apply, tree, images, sizes)
  assert detections.boxes.shape == (1, case.num_detections, 4)
  nodes = trees.flatten(tree, vq_array.is_vq).values()
  assert sum(map(vq_array.is_vq, nodes)) == 70


def test_fc6_by_position_is_the_same_function():
  rng = np.random.default_rng(0)
  pooled = jnp.asarray(rng.normal(size=(3, 7, 7, CHANNELS)), jnp.float32)
  outputs, kernels = [], []
  for layout, name in network.FC6_LAYOUTS.items():
    weights, template = box_head(name)
    variables = mask_rcnn.load_torch(weights, template)
    params = variables["params"]["roi_heads"]["box_head"]
    head = roi_heads.BoxHead(name, OUTPUTS, jnp.float32)
    outputs.append(quick.jit(head.apply)({"params": params}, pooled))
    kernels.append(params[name]["kernel"])

    def mixed(variables, pooled, head=head):
      mix, params = variables["mix"], variables["params"]
      return head.apply({"params": params}, pooled @ mix)

    both = {"params": params, "mix": jnp.eye(CHANNELS)}
    axes = discover.infer_channels(mixed, both, pooled)
    rows = axes[f"params/{name}/kernel"][0]
    assert (rows.outer, rows.inner) == ((49, 1) if layout == "hwc" else (1, 49))
    assert rows.group == axes["mix"][1].group
  np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01
  # Channels 16 to 31 of the first position, of the first output.
  block = blocks.BlockSpec(16).to_blocks(kernels[1])[0, 1]
  torchs = weights["roi_heads.box_head.fc6.weight"]
  torchs = torchs.reshape(OUTPUTS, CHANNELS, 49)
  np.testing.assert_allclose(block, torchs[0, 16:32, 0], rtol=1e-6)
