import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.core import blocks, storage, vq_array
from pqf_jax.core import plan as plans

SHAPES = {
  "params/stem/kernel": (7, 7, 3, 16),
  "params/conv/kernel": (3, 3, 16, 32),
  "params/fc/kernel": (32, 10),
  "params/fc/bias": (10,),
}
RULES = (
  plans.Rule("params/stem/kernel", None),
  plans.Rule("params/conv/kernel", 256, channels=2),
  plans.Rule("params/fc/kernel", 16, channels=4),
)


def _tree():
  struct = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in SHAPES.items()
  }
  return plans.trees.nest(struct)


def test_codes_are_clamped_to_a_quarter_of_the_sub_vectors():
  plan = plans.make_plan(RULES, _tree())
  assert plan["params/conv/kernel"].num_codes == 64  # 256 sub-vectors
  assert plan["params/fc/kernel"].num_codes == 16  # 80 sub-vectors
  assert "params/stem/kernel" not in plan


def test_size_is_counted_by_hand():
  size = plans.predict_size(plans.make_plan(RULES, _tree()), _tree())
  conv = 256 * 6 // 8 + 2 * 64 * 18
  fc = 80 * 4 // 8 + 2 * 16 * 4
  assert size.payload_bytes == conv + fc + 4 * (10 + 7 * 7 * 3 * 16)
  assert size.dense_bytes == 4 * (10 + 320 + 4608 + 2352)


def test_statistics_that_fold_into_a_norm_are_not_counted():
  struct = jax.ShapeDtypeStruct((8,), jnp.float32)
  affine = {"scale": struct, "bias": struct}
  stats = {"mean": struct, "var": struct}
  tree = {
    "params": {
      "bn": affine,
      "bare": {"bias": struct},
      "fc": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
    },
    "batch_stats": {"bn": stats, "bare": stats},
  }
  # bn: 2 vectors; bare has no scale to fold into: bias, mean and var stay.
  plan = plans.make_plan([plans.Rule(".*", 4)], tree)
  size = plans.predict_size(plan, tree)
  rows = {row.path: row.payload_bytes for row in size.layers}
  kernel = rows.pop("params/fc/kernel")
  assert kernel == 64 * 2 // 8 + 4 * 2
  assert rows.keys() == {
    *("params/bn/scale", "params/bn/bias", "params/bare/bias"),
    *("batch_stats/bare/mean", "batch_stats/bare/var"),
  }
  assert size.payload_bytes == (2 + 3) * 8 * 4 + kernel
  # Without a compressed kernel nothing is folded.
  assert plans.predict_size({}, tree).payload_bytes == (4 + 3) * 8 * 4 + 256


def test_size_in_smaller_types_is_counted_by_hand():
  tree = _tree() | {
    "batch_stats": {"x": jax.ShapeDtypeStruct((5,), jnp.float32)},
    "kernel": jax.ShapeDtypeStruct((6, 2), jnp.float32),
    "other": jax.ShapeDtypeStruct((7,), jnp.float32),
  }
  tree["params"]["wide"] = jax.ShapeDtypeStruct((3,), jnp.float64)
  tree["params"]["half"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
  plan = plans.make_plan((*RULES, plans.Rule("kernel", None)), tree)
  codes = 256 * 6 // 8 + 80 * 4 // 8
  codebooks = 64 * 18 + 16 * 4
  rounded = 10 + 7 * 7 * 3 * 16 + 6 * 2
  kept = 4 * (5 + 7) + 8 * 3 + 2 * 3
  for codebook, rest, expected in (
    ("float16", "float32", codes + 2 * codebooks + 4 * rounded + kept),
    ("int8", "float32", codes + codebooks + 4 * rounded + kept),
    ("float16", "float16", codes + 2 * codebooks + 2 * rounded + kept),
    ("int8", "float16", codes + codebooks + 2 * rounded + kept),
  ):
    size = plans.predict_size(plan, tree, storage.Storage(codebook, rest))
    assert size.payload_bytes == expected


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"codebook": "int4"}, "codebook='int4'; give 'float16' or 'int8'"),
    ({"codebook": jnp.int8}, "codebook=<"),
    ({"rest": "int8"}, "rest='int8'; give 'float32' or 'float16'"),
    ({"rest": []}, r"rest=\[\]"),
  ],
)
def test_unknown_types_of_storage_are_named(fields, message):
  with pytest.raises(errors.InputError, match=f"Storage has {message}"):
    storage.Storage(**fields)


def test_compressed_shapes_fit_the_plan():
  plan = plans.make_plan(RULES, _tree())
  node = plans.compressed_shapes(plan, _tree())["params"]["conv"]["kernel"]
  assert vq_array.is_vq(node)
  assert (node.codebook.shape, node.codes.shape) == ((64, 18), (32, 8))
  assert node.codes.dtype == jnp.uint8
  assert jax.eval_shape(lambda n: n.decode(), node).shape == (3, 3, 16, 32)


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    (RULES[:2], "no rule covers params/fc/kernel"),
    ((*RULES, plans.Rule("params/typo/.*", 4)), "params/typo"),
    (
      (plans.Rule(".*", None), *RULES),
      "an earlier rule matches",
    ),
    ((plans.Rule("(", 4),), "not a regular expression"),
    ((plans.Rule("(" * 3000 + ")" * 3000, 4),), "not a regular expression"),
    ((plans.Rule("a{9999999999}", 4),), "not a regular expression"),
    ((plans.Rule(b".*", 4),), "not a regular expression"),
    ((plans.Rule(".*", 1),), "num_codes=1"),
    ((plans.Rule(".*", 8.5),), "num_codes=8.5, .*, all whole"),
    ((plans.Rule(".*", 8, "2"),), "channels='2'"),
    (plans.Rule(".*", 8), "give a list of pqf_jax.Rule"),
    (((".*", 8),), "give a list of pqf_jax.Rule"),
    (None, "give a list of pqf_jax.Rule"),
    ((plans.Rule(".*", 8) for _ in "a"), "give a list of pqf_jax.Rule"),
    ((plans.Rule(".*", 4, channels=5),), "cannot be divided"),
    ((*RULES[:2], plans.Rule("params/fc/kernel", 4, 32)), None),
  ],
)
def test_bad_rules_are_named(rules, message):
  if message is None:
    assert plans.make_plan(rules, _tree())["params/fc/kernel"].num_codes == 2
    return
  with pytest.raises(errors.InputError, match=message):
    plans.make_plan(rules, _tree())


def test_a_layer_too_small_for_a_codebook_is_named():
  tree = {"fc": {"kernel": jax.ShapeDtypeStruct((4, 5), jnp.float32)}}
  with pytest.raises(errors.InputError, match="fc/kernel.*5 sub-vectors"):
    plans.make_plan([plans.Rule(".*", 16, channels=4)], tree)


def test_a_tree_without_kernels_is_refused_with_its_leaves():
  tree = {"mlp": {"w": jax.ShapeDtypeStruct((4, 5), jnp.float32)}}
  with pytest.raises(errors.InputError, match="only mlp/w; kernels are what"):
    plans.make_plan([], tree)


QUERY, OUT = blocks.KernelAxes((0,), (1, 2)), blocks.KernelAxes((0, 1), (2,))


def _plan(shape, found, **rule):
  tree = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  rules = [plans.Rule("w", 256, **rule)]
  return tree, plans.make_plan(rules, tree, found and {"w": found})["w"]


def test_axes_come_from_discovery_or_from_the_rule():
  _, layer = _plan((16, 2, 8), QUERY, channels=4)
  assert layer.spec == blocks.BlockSpec(4, (-3,), (-2, -1))
  for found in (None, QUERY):
    _, layer = _plan((2, 8, 16), found, channels=4, axes=OUT)
    assert layer.spec == blocks.BlockSpec(4, (-3, -2), (-1,))


def test_each_layer_of_a_stack_has_a_codebook():
  tree, layer = _plan(
    (8, 3, 16), blocks.KernelAxes((0,), (2,), (1,)), channels=2
  )
  assert layer.num_codes == 16  # of 64 sub-vectors a layer
  assert plans.predict_size({"w": layer}, tree).payload_bytes == (
    3 * 64 * 4 // 8 + 3 * 2 * 16 * 2
  )
  node = plans.compressed_shapes({"w": layer}, tree)["w"]
  assert (node.codebook.shape, node.codes.shape) == ((16, 3, 2), (16, 3, 4))
  assert node.shape == (8, 3, 16)


def test_leaves_that_are_no_arrays_are_no_kernels():
  tree = {
    "kernel": 2.0,
    "fc": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")},
  }
  assert list(plans.make_plan([plans.Rule(".*", 4)], tree)) == ["fc/kernel"]
  with pytest.raises(errors.InputError, match="matches kernel of shape"):
    plans.make_plan([plans.Rule("kernel", 4), plans.Rule(".*", 4)], tree)


def test_rows_of_embeddings_are_outputs_by_name_too():
  tree = {"embedding": jax.ShapeDtypeStruct((64, 8), jnp.float32)}
  plan = plans.make_plan([plans.Rule(".*", 16, 4)], tree)
  assert plan["embedding"].spec == blocks.BlockSpec(4, (-1,), (-2,))


@pytest.mark.parametrize(
  ("shape", "axes", "rule", "message"),
  [
    ((2, 6, 8), OUT, {"channels": 4}, r"6 input.*divisor of 6: 1, 2, 3, 6 "),
    ((8, 8), blocks.KernelAxes((0,), (2,)), {}, "from 0 to 1"),
    ((8, 8), blocks.KernelAxes((0,), (0,)), {}, "each axis once"),
    ((8, 8), blocks.KernelAxes((), (1,)), {}, "one input axis or more"),
    ((3, 8, 3, 8), blocks.KernelAxes((1,), (3,), (0, 2)), {}, "neighbouring"),
    ((2, 2, 8, 3, 8), blocks.KernelAxes((2,), (4,), (3,)), {}, "begin at 0 to"),
    ((8, 8), None, {"axes": ((0,), (1,))}, "give pqf_jax.KernelAxes"),
    ((8, 8), {}, {}, "matches w of shape .*no matrix product"),
  ],
)
def test_bad_axes_are_named(shape, axes, rule, message):
  if axes == {}:
    tree = {"w": jax.ShapeDtypeStruct(shape, "float32"), "kernel": None}
    tree["kernel"] = tree["w"]
    with pytest.raises(errors.InputError, match=message):
      plans.make_plan([plans.Rule("w", 4), plans.Rule("kernel", 4)], tree)
    return
  with pytest.raises(errors.InputError, match=message):
    _plan(shape, axes, **rule)


@pytest.mark.parametrize(
  "dtype", ["complex64", "int8", "bool", "float8_e4m3fn"]
)
def test_kernels_that_are_not_floats_are_refused(dtype):
  tree = {"fc": {"kernel": jax.ShapeDtypeStruct((16, 16), dtype)}}
  with pytest.raises(
    errors.InputError, match=f"fc/kernel is {dtype}, but only"
  ):
    plans.make_plan([plans.Rule(".*", 16)], tree)
  assert not plans.make_plan([plans.Rule(".*", None)], tree)


@pytest.mark.parametrize(
  ("num_codes", "used"), [(100, 64), (64, 64), (3, 2), (np.int64(5), 4)]
)
def test_numbers_of_codes_that_are_no_powers_of_two_are_said(
  num_codes, used, recwarn
):
  tree = {"fc": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}
  plan = plans.make_plan([plans.Rule(".*", num_codes)], tree)
  assert plan["fc/kernel"].num_codes == used
  said = [str(warning.message) for warning in recwarn]
  assert len(said) == (num_codes != used)
  assert all(f"num_codes={num_codes} becomes {used}" in text for text in said)
