"""`python -m benchmarks.store.peers`."""

from benchmarks.harness import script
from benchmarks.store.peers.benchmark import main

if __name__ == "__main__":
    script.run(main)
