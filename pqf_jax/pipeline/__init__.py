"""The whole job, from a config to a packed file; the only part that knows all.

stages      the four stages in order, and the other modes
job         what they share, checked before any work
training    the loop of stage 0 and of fine-tuning
weights     reads a weights file of any known kind
workspace   the files of a run
summary     its figures as plain data
"""

from pqf_jax.pipeline.stages import run as run
