"""Compiles a recipe for hardware that is not here: memory, traffic, time.

preflight      runs it, and names the largest batch that fits
programs       lowers and compiles what every chip would run
hardware       lists chips, and opens devices to compile for
gpu_compiler   opens XLA's compiler for GPUs where there is no GPU
costs          reads memory, FLOPs, traffic and collectives off a program
table          draws them

Nothing else imports this package; `config.mode=preflight` does.
"""

from pqf_jax.preflight.preflight import run as run
