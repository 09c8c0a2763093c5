"""Reports: sources that are read, sections, tables, plots, sheets of crops."""
