"""Perplexity of wikitext-103-raw-v1."""

from hf_pqcache.eval.tasks._wikitext import wikitext

task = wikitext("wikitext-103-raw-v1", folder="wikitext-103-raw", suffix="raw")
