"""The consolidation study: findings, ablations, and what kept labels allow beyond."""
