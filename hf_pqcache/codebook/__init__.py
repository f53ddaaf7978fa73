"""Codebooks: trained, saved, shared, and the arithmetic of product quantization."""
