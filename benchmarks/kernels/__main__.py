"""`python -m benchmarks.kernels`."""

from benchmarks.kernels.benchmark import main

if __name__ == "__main__":
    main()
