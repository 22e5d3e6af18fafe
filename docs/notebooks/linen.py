# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own Linen model
#
# A small network with batch norms is compressed by the paper's rules, and its
# statistics stay right without any training.

# %%
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp

import pqf_jax


class Network(nn.Module):
  """Two convolutions with norms, and a head."""

  @nn.compact
  def __call__(self, x):
    for width in (32, 64):
      x = nn.Conv(width, (3, 3), use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    return nn.Dense(10)(x.mean((1, 2)))


model = Network()
images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
variables = model.init(jax.random.key(1), images)

# %% [markdown]
# Which variables are kernels, and which channels may move together? Both are
# read from the program of the network.

# %%
for path, axes in pqf_jax.find_kernels(model.apply, variables, images).items():
  print(path, axes)

# %%
channels = pqf_jax.discover_channels(model.apply, variables, images)
for path, row in channels.items():
  print(path, [axis and axis.group for axis in row])

# %% [markdown]
# Rules say how each kernel is compressed: the first that matches its path
# decides. The first layer stays dense; it is 3 % of the weights.

# %%
rules = [
  pqf_jax.Rule("params/Conv_0/kernel", None),
  pqf_jax.Rule(".*/kernel", 64, channels=2, kmeans_steps=50),
]
plan = pqf_jax.make_plan(rules, variables)
print(pqf_jax.predict_size(plan, variables).payload_bytes, "bytes")

# %% [markdown]
# Permute, quantize and calibrate. The calibration takes samples without labels.

# %%
result = pqf_jax.compress(
  model.apply,
  variables,
  images[:1],
  rules,
  key=jax.random.key(2),
  calibration=[images],
)
for path, error in result.outputs.items():
  print(path, error)

# %% [markdown]
# The result is the same tree with `VQArray` kernels. `save` folds the norms, so
# it asks for their epsilon.

# %%
print(jax.tree.map(jnp.shape, result.variables["params"]["Conv_1"]))
with tempfile.TemporaryDirectory() as folder:
  path = f"{folder}/model.safetensors"
  pqf_jax.save(path, result.variables, norm_epsilon=1e-5)
  loaded = pqf_jax.load(path)
dense = model.apply(variables, images)
difference = jnp.linalg.norm(model.apply(loaded, images) - dense)
print(f"change of the outputs: {difference / jnp.linalg.norm(dense):.1%}")
