"""What a pack is made of: sources that are read, images that are encoded, shards, index and manifest."""
