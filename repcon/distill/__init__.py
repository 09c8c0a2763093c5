"""Training a student from stored labels: loader, loss, loop, checkpoints, validation, metrics."""
