"""The text that every server is asked first, so that what depends on the first text is the same in all of them."""

from __future__ import annotations

from typing import Any

from hf_pqcache.demo import TEXT

USUAL_TOKENS = 512


def usual_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """A text of everyday words, as tokens; fewer where the tokenizer has few."""
    text = TEXT.read_text(encoding="utf-8")[: 8 * USUAL_TOKENS]
    return [token for token in tokenizer(text, verbose=False)["input_ids"] if 0 <= token < vocab_size][:USUAL_TOKENS]
