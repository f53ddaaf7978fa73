"""The tokens of a cache: which sequence holds what, and the memory of its layers."""
