"""How each platform takes a step of k-means; see `pqf_jax.ops.clusters`."""
