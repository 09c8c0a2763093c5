"""`python -m benchmarks.loaders`."""

from benchmarks.harness import script
from benchmarks.loaders.benchmark import main

if __name__ == "__main__":
    script.run(main)
