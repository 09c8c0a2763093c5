"""The KL of many heads: its specification, the torch and Triton forms, and their operators."""
