"""`python -m benchmarks.training.peers`."""

from benchmarks.harness import script
from benchmarks.training.peers.benchmark import main

if __name__ == "__main__":
    script.run(main)
