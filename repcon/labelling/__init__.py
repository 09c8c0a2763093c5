"""What precompute is made of: pixels ahead, teachers side by side, units claimed and written."""
