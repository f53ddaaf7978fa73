"""Pages: their bytes, the pool that hands them out, host memory, what kernels address."""
