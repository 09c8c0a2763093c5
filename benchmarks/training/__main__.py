"""`python -m benchmarks.training`."""

from benchmarks.harness import script
from benchmarks.training.benchmark import main

if __name__ == "__main__":
    script.run(main)
