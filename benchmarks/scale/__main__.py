"""`python -m benchmarks.scale`."""

from benchmarks.harness import script
from benchmarks.scale.benchmark import main

if __name__ == "__main__":
    script.run(main)
