"""What grows with a store, and what does not."""
