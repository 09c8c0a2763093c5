"""What the label store is made of: layout, manifest, markers, shards and their reader, labels in memory."""
