"""The label store against raw files and its peers."""
