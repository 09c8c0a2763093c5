"""How well features transfer: cached features, probes, intervals."""
