"""One module per command of `repcon`: `run(settings)` does the work and gives the figures."""
