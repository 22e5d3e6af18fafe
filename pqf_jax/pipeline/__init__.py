"""The whole job, from a config to a packed file.

modes       runs what a config asks for
stages      runs the four stages in order
job         resolves and checks what the stages share, before any work
training    trains, in stage 0 and in fine-tuning
weights     reads a weights file of any known kind
workspace   holds the files of a run
"""

from pqf_jax.pipeline.modes import run as run
