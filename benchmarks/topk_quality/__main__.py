"""`python -m benchmarks.topk_quality`."""

from benchmarks.harness import script
from benchmarks.topk_quality.benchmark import main

if __name__ == "__main__":
    script.run(main)
