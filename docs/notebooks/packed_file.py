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
# # Inside a packed file
#
# A packed file is a `.safetensors` file with a header. `pqf_jax.inspect` checks
# all of it and says what is in it.

# %%
import json
import struct
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import pqf_jax

kernel = jax.random.normal(jax.random.key(0), (64, 128))
# Channels that resemble each other, as trained ones do.
kernel = kernel + jnp.roll(kernel, 1, 0)
variables = {"params": {"layer": {"kernel": kernel, "bias": jnp.zeros(128)}}}
rules = [pqf_jax.Rule(".*", 64, channels=4, kmeans_steps=50)]
plan = pqf_jax.make_plan(rules, variables)
compressed, layers = pqf_jax.quantize_params(jax.random.key(1), variables, plan)
path = f"{tempfile.mkdtemp()}/model.safetensors"
pqf_jax.save(path, compressed)

# %% [markdown]
# ## The table

# %%
found = pqf_jax.inspect(path)
print(found)

# %% [markdown]
# `used` counts the codewords that any sub-vector has. The entropy is that of a
# code: if it were far below log2(K), a coder of their frequencies could save
# bytes. It is not, so codes are stored with whole bits.

# %%
(layer,) = found.kernels
uses = np.sort(layer.uses[0])[::-1]
print("most and least used codewords:", uses[:4], uses[-4:])
print("codebook", layer.codebooks.shape, layer.codebooks.dtype)

# %% [markdown]
# ## The bytes
#
# 2,048 sub-vectors of 4 weights, with 6 bits each; 64 codewords of 4 float16
# numbers; 128 biases of 4 bytes.

# %%
size = layer.size
bits = int(np.log2(size.num_codes))
codes = size.num_subvectors * bits // 8
codebook = size.num_codes * size.length * 2
print(codes, "+", codebook, "+", 128 * 4, "=", found.payload_bytes)
assert codes + codebook + 128 * 4 == found.payload_bytes

# %% [markdown]
# Any program for safetensors lists the buffers: eight bytes with the length of
# the header, and then JSON.

# %%
with open(path, "rb") as file:
  (length,) = struct.unpack("<Q", file.read(8))
  header = json.loads(file.read(length))
for name, about in header.items():
  if name != "__metadata__":
    print(name, about["dtype"], about["shape"])

# %% [markdown]
# ## What comes back
#
# `load` compares a digest first: a single wrong bit is refused.

# %%
loaded = pqf_jax.load(path)["params"]["layer"]["kernel"]
print(loaded.codes.shape, loaded.codebook.shape, loaded.shape)
with open(path, "rb") as file:
  content = bytearray(file.read())
content[-1] ^= 1
with open(path, "wb") as file:
  file.write(content)
try:
  pqf_jax.load(path)
except pqf_jax.InputError as error:
  print(str(error).rpartition("/")[2])
