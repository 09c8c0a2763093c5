"""`python -m benchmarks.precompute`."""

from repcon.runtime.system import sleep_when_idle

sleep_when_idle()  # as the command line does, before torch is imported

from benchmarks.harness import script  # noqa: E402
from benchmarks.precompute.benchmark import main  # noqa: E402

if __name__ == "__main__":
    script.run(main)
