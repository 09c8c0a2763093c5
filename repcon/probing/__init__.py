"""What transfer is made of: cached features, probes, intervals, and how the results are shown."""
