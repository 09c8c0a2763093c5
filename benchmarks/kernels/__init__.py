"""The loss kernels against other ways to compute the same."""
