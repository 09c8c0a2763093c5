"""What train and teach are made of: the feed, the step, the loop, checkpoints, validation, logs."""
