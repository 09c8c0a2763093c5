"""Loaders: requests for crops in, batches of pixels out, in the same order."""
