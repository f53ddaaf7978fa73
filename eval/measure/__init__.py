"""Measurements under any cache: perplexity, recall, speed, memory, benchmarks."""
