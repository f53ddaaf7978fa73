"""Benchmarks of kernels and of `generate` on a GPU."""
