"""`python -m benchmarks.experiments.consolidation`."""

from benchmarks.experiments.consolidation.benchmark import main
from benchmarks.harness import script

if __name__ == "__main__":
    script.run(main)
