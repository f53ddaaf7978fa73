"""Perplexity of wikitext-2-raw-v1."""

from hf_pqcache.eval.tasks._wikitext import wikitext

task = wikitext("wikitext-2-raw-v1", folder="wikitext-2-raw", suffix="raw")
