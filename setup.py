"""Packages of the wheel: the library, and the recipes inside of it."""

import setuptools

setuptools.setup(
  packages=[
    # Folders of templates are packages too.
    *setuptools.find_namespace_packages(include=["pqf_jax*"]),
    "pqf_jax.configs",
  ],
  package_dir={"pqf_jax.configs": "configs"},
)
