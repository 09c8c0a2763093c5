"""`python -m benchmarks.precompute.peers`."""

from benchmarks.harness import script
from benchmarks.precompute.peers.benchmark import main

if __name__ == "__main__":
    script.run(main)
