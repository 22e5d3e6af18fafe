"""Services of the machine: processes, files, checkpoints, progress.

distributed  runs one program on many processes and devices
checkpoint   saves and restores stages
files        writes files whole or not at all, on disks and in buckets
progress     prints bars, lines and tables
threads      runs NumPy work on several cores
preemption   turns SIGTERM into a request to save and stop
xla_flags    sets XLA's flags, before jax starts
"""
