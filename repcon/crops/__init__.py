"""The crop plan."""
