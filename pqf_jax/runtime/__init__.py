"""Processes, files, checkpoints, progress: what a run needs of its machine."""
