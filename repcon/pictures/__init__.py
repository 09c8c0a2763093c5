"""The demo's pictures: icon sets from packages, rendered into image folders."""
