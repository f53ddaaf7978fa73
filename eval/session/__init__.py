"""One model under one cache, and the rows that are measured on it."""
