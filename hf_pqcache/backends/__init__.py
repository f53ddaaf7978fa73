"""Who computes on pages: CUDA kernels where they can, plain torch elsewhere."""
