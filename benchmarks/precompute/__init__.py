"""Precomputing labels against its limit."""
