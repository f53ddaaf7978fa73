"""What transformers' configs and code say of a model; no tensor, no cache."""
