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
# # Your own NNX model
#
# The library works on functions of a tree of variables. `nnx.split` makes one
# of a module: the graph is the function, the state is the tree.

# %%
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import pqf_jax


class Network(nnx.Module):
  """Two layers and a residual connection."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Linear(64, 128, rngs=rngs)
    self.inner = nnx.Linear(128, 128, rngs=rngs)
    self.head = nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.embed(x))
    return self.head(x + nnx.relu(self.inner(x)))


network = Network(nnx.Rngs(0))
graph, state = nnx.split(network)

# %% [markdown]
# Parameters go under `params`: that is where the fine-tuning looks for what it
# may train.

# %%
variables = {"params": nnx.to_pure_dict(state)}


def apply_fn(variables, x):
  """Applies the network to a pure tree of its parameters."""
  return nnx.merge(graph, nnx.State(variables["params"]))(x)


x = jax.random.normal(jax.random.key(0), (256, 64))
assert (apply_fn(variables, x) == network(x)).all()

# %% [markdown]
# Compress it to a tenth, by rules that choose themselves.

# %%
rules = pqf_jax.auto_rules(
  apply_fn, variables, x, target_ratio=10, kmeans_steps=50
)
result = pqf_jax.compress(apply_fn, variables, x, rules, key=jax.random.key(1))
print(f"{result.size.payload_bytes:,} bytes, {result.size.ratio:.1f}x smaller")

# %% [markdown]
# Fine-tune the codebooks, here toward the outputs of the dense network.

# %%
teacher = network(x)


def loss_fn(variables, batch, key):
  """Returns the squared distance to the dense network."""
  del key
  outputs = apply_fn(variables, batch["x"])
  return ((outputs - batch["teacher"]) ** 2).mean(), ({}, {})


optimizer = optax.adam(3e-3)
step = pqf_jax.make_finetune_step(loss_fn, optimizer)
training = pqf_jax.init_state(result.variables, optimizer)
for number in range(200):
  training, metrics = step(training, {"x": x, "teacher": teacher})
  if number % 50 == 0:
    print(number, float(metrics["loss"]))

# %% [markdown]
# Pack, load, and put the variables back into a module. Its kernels are
# `VQArray`s, which NNX layers read as arrays.

# %%
with tempfile.TemporaryDirectory() as folder:
  path = f"{folder}/model.safetensors"
  pqf_jax.save(path, pqf_jax.state_variables(training))
  loaded = pqf_jax.load(path)
packed = nnx.merge(graph, nnx.State(loaded["params"]))
print(loaded["params"]["inner"]["kernel"])
change = jnp.linalg.norm(packed(x) - teacher) / jnp.linalg.norm(teacher)
print(f"change of the outputs: {change:.1%}")
