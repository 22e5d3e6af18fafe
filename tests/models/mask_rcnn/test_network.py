import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.core import trees
from pqf_jax.models import mask_rcnn
from pqf_jax.models.mask_rcnn import masks as mask_ops
from tests.models import quick
from tests.models.mask_rcnn import mask_rcnn_cases as cases
from tests.oracles import mask_rcnn_weights, resnet_weights

GOLDEN = np.load(
  pathlib.Path(__file__).parents[2] / "goldens" / "mask_rcnn.npz"
)
NUM_PARAMETERS = 44_401_393  # of torchvision's file


def test_names_shapes_and_size_are_torchvisions():
  template = cases.template(50, 91)
  expected = mask_rcnn_weights.shapes(50, 91)
  weights = {name: np.zeros(shape) for name, shape in expected.items()}
  variables = mask_rcnn.load_torch(weights, template)
  assert trees.shapes(variables) == template
  params = jax.tree.leaves(template["params"])
  norms = sum(leaf.size for leaf in jax.tree.leaves(template["batch_stats"]))
  # torchvision's frozen norms are no parameters: two vectors a norm less.
  assert sum(leaf.size for leaf in params) - norms == NUM_PARAMETERS


def test_paths_are_torchvisions_first_names_with_slashes():
  paths = trees.flatten(cases.template(50, 91))
  assert {
    "params/backbone/body/layer1/0/conv1/kernel",
    "batch_stats/backbone/body/layer4/2/bn3/var",
    "params/backbone/fpn/inner_blocks/0/kernel",
    "params/backbone/fpn/layer_blocks/3/bias",
    "params/rpn/head/conv/kernel",
    "params/roi_heads/box_head/fc6/kernel",
    "params/roi_heads/mask_head/mask_fcn4/kernel",
    "params/roi_heads/mask_predictor/conv5_mask/kernel",
  } <= paths.keys()


def test_both_generations_of_names_give_the_same_variables():
  # No side longer than 3: all weights at full size would take seconds.
  shapes = mask_rcnn_weights.shapes(18, 5)
  small = {
    name: tuple(min(side, 3) for side in shape)
    for name, shape in shapes.items()
  }
  weights = resnet_weights.draw(small)
  renamed = mask_rcnn_weights.rename(weights)
  assert "roi_heads.mask_head.0.0.weight" in renamed
  assert len(renamed.keys() - weights.keys()) == 2 * (8 + 1 + 4)
  template = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      tuple(min(side, 3) for side in leaf.shape), leaf.dtype
    ),
    cases.template(18, 5),
  )
  first, second = (
    mask_rcnn.load_torch(w, template) for w in (weights, renamed)
  )
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("name", ["small", "deep"])
def test_detections_are_those_that_torchvision_gave_image_by_image(name):
  case = {"small": mask_rcnn_weights.SMALL, "deep": mask_rcnn_weights.DEEP}[
    name
  ]
  images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
  with cases.double():
    variables = cases.variables(case)
    detect = quick.jit(cases.make(case).apply, optimize=True)
    # A batch of all images would take 2 GB.
    detections = [
      jax.device_get(detect(variables, image[None], size[None]))
      for image, size in zip(images, sizes, strict=True)
    ]
  for i, (height, width) in enumerate(case.sizes):
    objects = jax.tree.map(lambda rows: rows[0], detections[i])
    expected = {
      entry: GOLDEN[f"{name}/{i}/{entry}"]
      for entry in ("boxes", "scores", "labels", "masks")
    }
    valid = objects.valid
    assert valid.sum() == len(expected["labels"]) >= 20
    np.testing.assert_array_equal(objects.labels[valid], expected["labels"])
    boxes = objects.boxes[valid]
    np.testing.assert_allclose(boxes, expected["boxes"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(
      objects.scores[valid], expected["scores"], rtol=0, atol=1e-10
    )
    pasted = mask_ops.paste_masks(objects.masks[valid], boxes, height, width)
    expected = np.unpackbits(expected["masks"], axis=-1, count=width)
    np.testing.assert_array_equal(pasted, expected)
    assert 0.005 < expected.mean() < 0.5


def test_the_golden_file_is_what_torchvision_gives():
  try:
    from tests.oracles import torchvision_mask_rcnn
  except (ImportError, RuntimeError):  # the latter of mismatched versions
    pytest.skip("no working torchvision")
  case = mask_rcnn_weights.SMALL
  model = torchvision_mask_rcnn.build(case)
  images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
  for i, (height, width) in enumerate(sizes):
    objects = torchvision_mask_rcnn.detect(model, images[i, :height, :width])
    masks = np.packbits(objects.pop("masks") > 0.5, axis=-1)
    np.testing.assert_array_equal(masks, GOLDEN[f"small/{i}/masks"])
    for name, array in objects.items():
      np.testing.assert_allclose(array, GOLDEN[f"small/{i}/{name}"], atol=1e-9)


def test_batches_of_float32_find_the_same_and_zeros_where_there_is_no_more():
  case = mask_rcnn_weights.SMALL
  images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
  with jax.numpy_dtype_promotion("standard"):
    model = cases.make(case, jnp.float32, score_threshold=0.85)
    variables = cases.variables(case, jnp.float32)
    detect = quick.jit(model.apply, optimize=True)
    # The first image comes with another one each time.
    pairs = [[0, 1], [0, 3]]
    batches = [
      jax.device_get(detect(variables, images[pair], sizes[pair]))
      for pair in pairs
    ]
  for pair, objects in zip(pairs, batches, strict=True):
    for row, i in enumerate(pair):
      scores, boxes = GOLDEN[f"small/{i}/scores"], GOLDEN[f"small/{i}/boxes"]
      valid = objects.valid[row]
      count = (scores > 0.85).sum()
      assert valid.sum() == count < case.num_detections
      np.testing.assert_allclose(
        objects.scores[row][valid], scores[:count], atol=5e-4
      )
      np.testing.assert_allclose(
        objects.boxes[row][valid], boxes[:count], atol=2e-2
      )
      for leaf in objects:
        assert not leaf[row][~valid].any()
  for one, other in zip(*batches, strict=True):
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_classes": 0}, "num_classes=0"),
    ({"depth": 20}, "depth=20"),
    ({"canvas": (800, 1333)}, r"canvas=\(800, 1333\).*multiples of 32"),
    ({"anchor_sizes": ((32,), (64,))}, "anchor_sizes"),
    ({"dtype": jnp.int32}, "dtype"),
  ],
)
def test_other_settings_are_refused(settings, message):
  with pytest.raises(errors.InputError, match=message):
    mask_rcnn.make(**{"num_classes": 91} | settings)


def test_weights_of_another_network_are_refused_with_names_and_shapes():
  shapes = mask_rcnn_weights.shapes(18, 5)
  weights = {name: np.zeros(shape, np.int8) for name, shape in shapes.items()}
  with pytest.raises(errors.InputError) as caught:
    mask_rcnn.load_torch(weights, cases.template(50, 91))
  message = str(caught.value)
  assert "165 missing (backbone.body.layer1.0.bn3.bias" in message
  assert "backbone.body.layer1.0.conv1.weight is (64, 64, 3, 3)" in message
