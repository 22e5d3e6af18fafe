"""The whole job, from a config to a packed file; the only part that knows all.

modes           what a config may ask for
stages          the four stages in order
job             what they share, checked before any work
tasks           what classification and detection do differently
detection_task  the second of them
training        the loop of stage 0 and of fine-tuning
preemption      stops it when the scheduler says so
weights         reads a weights file of any known kind
workspace       the files of a run
summary         its figures as plain data
preflight       compiles it for hardware that is not here, with rehearsals,
                chips, costs, preflight_table
hub             fetches weights;  torch_files reads torch's
"""

from pqf_jax.pipeline.modes import run as run
