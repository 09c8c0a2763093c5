"""`python -m benchmarks.store`."""

from benchmarks.harness import script
from benchmarks.store.benchmark import main

if __name__ == "__main__":
    script.run(main)
