"""`python -m benchmarks`: all of them, in their short form."""

from benchmarks.harness import script
from benchmarks.harness.run import main

if __name__ == "__main__":
    try:
        script.run(main)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
