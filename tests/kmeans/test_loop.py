"""The programs of k-means: their memory, as the compiler plans it, and bits."""

import jax
import jax.numpy as jnp
import pytest

from pqf_jax.kmeans import annealing, batching, loop
from tests.kmeans import cases


def _temporary(function, *arguments, **settings):
  compiled = function.lower(*arguments, **settings).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_programs_of_one_platform_have_the_bits_of_those_of_all(
  monkeypatch, platform
):
  vectors = jnp.asarray(cases.normal(cases.N, cases.D))
  results = []
  for known in (None, platform):
    monkeypatch.setattr(batching, "platform_of", lambda layers, it=known: it)
    results.append(cases.annealed(jax.random.key(0), vectors))
  cases.assert_same(*results)


def test_the_platform_is_known_of_arrays_on_devices():
  vectors = cases.normal(8, 4)
  assert batching.platform_of([vectors]) is None
  assert batching.platform_of([jnp.asarray(vectors)]) == jax.default_backend()
  seen = []
  jax.eval_shape(lambda x: seen.append(batching.platform_of([x])), vectors)
  assert seen == [None]


@pytest.mark.parametrize(
  "count, length, num_codes", [(16384, 4, 2048), (1 << 20, 4, 16)]
)
def test_temporaries_are_few_arrays_of_the_size_of_the_sub_vectors(
  count, length, num_codes
):
  method = annealing.method(count, length, num_codes)
  assert method.assigns_by_hartigan == (num_codes == 2048)
  batch = jax.eval_shape(
    lambda vectors: batching.make_batch([vectors]),
    jax.ShapeDtypeStruct((count, length), jnp.float32),
  )
  num_tiles = len(batch.tiles)
  options = loop.Options(
    count,
    num_hartigan_steps=2,
    num_hartigan_tiles=num_tiles if method.assigns_by_hartigan else 0,
  )
  means = jax.ShapeDtypeStruct((1, length), jnp.float32)
  prepared = jax.eval_shape(
    lambda *data: loop.centre(*data, options=options), batch, means
  )
  steps = (
    prepared,
    jax.ShapeDtypeStruct((1, num_codes, length), jnp.float32),
    annealing.make_schedule(3, [method]),
    jax.ShapeDtypeStruct((3, 1, num_codes, length), jnp.bfloat16),
  )
  size = 4 * count * length
  # Of [N, 2 D + 2] words, those of 64 tiles.
  some = 4 * 64 * batching.TILE * (2 * length + 2) * 2
  rest = some + 200 * num_codes * length
  assert _temporary(loop.layer_means, batch, options=options) < size + rest
  assert (
    _temporary(loop.centre, batch, means, options=options) < size / 2 + rest
  )
  assert _temporary(loop.run_steps, *steps, options=options) < 2 * size + rest
