"""The label store: layout, manifest, completion records, shards and their reader, labels in memory."""
