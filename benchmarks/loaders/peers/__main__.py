"""`python -m benchmarks.loaders.peers`."""

from benchmarks.harness import script
from benchmarks.loaders.peers.benchmark import main

if __name__ == "__main__":
    script.run(main)
