import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.kmeans import batching, loop
from pqf_jax.kmeans.backends import portable, tpu

MOST_ROWS = 4096


@pytest.fixture(scope="module")
def points():
  draws = np.random.default_rng(0)
  layers = [
    jnp.asarray(draws.standard_t(4, (count, 9)), jnp.float32)
    for count in (1500, 700, 3000)
  ]
  batch, options = batching.make_batch(layers), loop.Options(MOST_ROWS)
  return loop.prepare(batch, options=options).points


# The kernels for a TPU take 256 centroids at a time.
@pytest.fixture(params=[37, 300])
def codebooks(request):
  draws = np.random.default_rng(1)
  return jnp.asarray(draws.standard_normal((3, request.param, 9)), jnp.float32)


@pytest.fixture
def interpreted(monkeypatch):
  for name in ("nearest", "sums"):
    run = functools.partial(getattr(tpu, name), interpret=True)
    monkeypatch.setattr(tpu, name, run)


def _results(backend, points, codebooks):
  prepared = backend.prepare(points)
  codes = backend.codes(prepared, codebooks)
  integers = backend.sums(prepared, codes, codebooks.shape[1], MOST_ROWS)
  return codes, backend.totals(prepared, integers)


def test_totals_are_those_of_numpy(points, codebooks):
  codes, totals = _results(portable.BACKEND, points, codebooks)
  vectors = np.stack(points.columns, axis=2).astype(np.float64)
  inside = np.asarray(batching.mask(points.layout))
  owners = np.broadcast_to(points.layout.layers[:, None], inside.shape)[inside]
  where = owners, np.asarray(codes)[inside]
  shape = codebooks.shape[:2]
  sums, norms, counts = (np.zeros((*shape, width)) for width in (9, 1, 1))
  np.add.at(sums, where, vectors[inside])
  np.add.at(norms, where, np.square(vectors[inside]).sum(1, keepdims=True))
  np.add.at(counts, where, 1)
  np.testing.assert_allclose(totals.vectors, sums, atol=1e-4)
  np.testing.assert_allclose(totals.norms, norms[:, :, 0], rtol=1e-3, atol=1)
  np.testing.assert_array_equal(totals.counts, counts[:, :, 0])


@pytest.mark.usefixtures("interpreted")
def test_the_backend_of_a_tpu_gives_the_same_bits(points, codebooks):
  plain = _results(portable.BACKEND, points, codebooks)
  products = _results(tpu.BACKEND, points, codebooks)
  jax.tree.map(np.testing.assert_array_equal, products, plain)


@pytest.mark.usefixtures("interpreted")
def test_ties_go_to_the_lowest_index_on_a_tpu(points):
  codebooks = jnp.repeat(jnp.zeros((3, 1, 9)), 300, axis=1)
  codes, totals = _results(tpu.BACKEND, points, codebooks)
  np.testing.assert_array_equal(codes, 0)
  np.testing.assert_array_equal(totals.counts[:, 0], points.layout.sizes)


@pytest.mark.parametrize("excess", [0, 1])
def test_layers_of_too_many_rows_are_scattered_on_a_tpu(excess):
  backends = loop.backends_for(9, 8, tpu.MOST_ROWS + excess)
  assert ("tpu" in backends) == (excess == 0)
