"""Packs of images: sources that are read, images that are encoded, shards, index and manifest."""
