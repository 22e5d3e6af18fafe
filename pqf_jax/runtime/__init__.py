"""Services of the machine: processes, files, checkpoints, progress."""
