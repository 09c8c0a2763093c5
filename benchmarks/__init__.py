"""The benchmarks: one package per claim, what they share in `harness`, longer studies in `experiments`."""
