import jax
import jax.numpy as jnp

from pqf_jax.kmeans import annealing, batching, loop


def test_no_matrix_of_all_pairs_is_stored():
  count, length, num_codes = 16384, 4, 2048
  method = annealing.method(count, length, num_codes)
  assert method.assigns_by_hartigan
  batch = jax.eval_shape(
    lambda vectors: batching.make_batch([vectors]),
    jax.ShapeDtypeStruct((count, length), jnp.float32),
  )
  lowered = jax.jit(loop.fit, static_argnames="options").lower(
    batch,
    jax.ShapeDtypeStruct((1, num_codes, length), jnp.float32),
    annealing.make_schedule(3, [method]),
    jax.ShapeDtypeStruct((3, 1, num_codes, length), jnp.bfloat16),
    options=loop.Options(
      count, num_hartigan_steps=2, num_hartigan_tiles=len(batch.tiles)
    ),
  )
  temporary = lowered.compile().memory_analysis().temp_size_in_bytes
  assert temporary < 4 * count * (10 * length + 20) + 100 * num_codes * length
  assert temporary < 4 * count * num_codes / 2
