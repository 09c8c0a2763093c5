"""Stored top-k labels against teachers in every step."""
