"""Loaders against those of other projects."""
