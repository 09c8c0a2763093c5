"""Errors, devices, files, output folders and the terminal: what every other package builds on."""
