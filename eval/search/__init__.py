"""Searches over shapes of a cache."""
