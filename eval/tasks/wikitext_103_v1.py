"""Perplexity of wikitext-103-v1."""

from hf_pqcache.eval.tasks._wikitext import wikitext

task = wikitext("wikitext-103-v1", folder="wikitext-103", suffix="tokens")
