"""What reports are made of: sources that are read, sections, tables, plots, sheets of crops."""
