"""Backbones, teachers and students, and their weights, preprocessing and model cards."""
