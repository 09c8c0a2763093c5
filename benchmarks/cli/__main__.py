"""`python -m benchmarks.cli`."""

from benchmarks.cli.benchmark import main
from benchmarks.harness import script

if __name__ == "__main__":
    script.run(main)
