"""`python -m benchmarks.precompute`."""

from benchmarks.harness import script
from benchmarks.precompute.benchmark import main

if __name__ == "__main__":
    script.run(main)
