"""From crops to stored labels: teachers, batches, units of work and the processes that share them."""
