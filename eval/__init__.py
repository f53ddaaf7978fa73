"""Evaluation: perplexity, accuracy study."""
