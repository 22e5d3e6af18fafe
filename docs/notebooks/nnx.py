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
# A module goes in, and a module of the same class comes out.

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
x = jax.random.normal(jax.random.key(0), (256, 64))

# %% [markdown]
# Compress it to a tenth, by rules that choose themselves.

# %%
result = pqf_jax.compress(
  network, sample=x, target_ratio=10, key=jax.random.key(1)
)
print(f"{result.size.payload_bytes:,} bytes, {result.size.ratio:.1f}x smaller")

# %% [markdown]
# Its kernels are `VQArray`s, which NNX layers read as arrays. Fine-tune the
# codebooks, here toward the outputs of the dense network.

# %%
teacher = network(x)


def loss_fn(network, batch, key):
  """Returns the squared distance to the dense network."""
  del key
  loss = ((network(batch["x"]) - batch["teacher"]) ** 2).mean()
  return loss, (network, {})  # its statistics, of which it has none; no metrics


optimizer = optax.adam(3e-3)
step = pqf_jax.make_finetune_step(loss_fn, optimizer)
training = pqf_jax.init_state(result.variables, optimizer)
for number in range(200):
  training, metrics = step(training, {"x": x, "teacher": teacher})
  if number % 50 == 0:
    print(number, float(metrics["loss"]))

# %% [markdown]
# Pack, and load into a module of the same class.

# %%
with tempfile.TemporaryDirectory() as folder:
  path = f"{folder}/model.safetensors"
  pqf_jax.save(path, pqf_jax.state_variables(training))
  packed = pqf_jax.load(path, template=network)
print(packed.inner.kernel[...])
change = jnp.linalg.norm(packed(x) - teacher) / jnp.linalg.norm(teacher)
print(f"change of the outputs: {change:.1%}")
