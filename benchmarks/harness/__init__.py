"""What every benchmark shares: options, records, tables, targets, and the run of all of them."""
