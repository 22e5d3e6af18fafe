"""Image data sets, one module each; `pqf_jax.data` lists them."""
