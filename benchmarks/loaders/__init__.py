"""Loaders against bare decoding and against their peers."""
