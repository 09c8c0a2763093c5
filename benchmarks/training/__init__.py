"""Training from stored labels against what it replaces."""
