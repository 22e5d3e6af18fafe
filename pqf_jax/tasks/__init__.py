"""Loss and metrics, one module a task."""
