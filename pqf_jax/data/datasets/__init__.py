"""Data sets of labelled images, one module each; `pqf_jax.data` names them."""
