"""The transformers caches: PagedPQCache, PagedKVCache and what they are made of."""
