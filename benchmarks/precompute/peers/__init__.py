"""Precomputing labels with what a user would write without repcon."""
