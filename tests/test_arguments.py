"""A path, a dict or a whole model where an object belongs is refused in one line that says what to pass."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache, calibrate
from hf_pqcache.eval.measure.perplexity import perplexity

CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=64)
MODEL = LlamaForCausalLM(CONFIG)
WRONG: dict[str, tuple[Any, str]] = {
    "codebook path": (lambda: PagedPQCache(CONFIG, "user/codebook"), r"Codebook\.from_pretrained\('user/codebook'\)"),  # type: ignore[arg-type]
    "codebook kind": (lambda: PagedPQCache(CONFIG, CONFIG), "must be a Codebook.* LlamaConfig"),  # type: ignore[arg-type]
    "model": (lambda: PagedPQCache(MODEL), "whole LlamaForCausalLM: pass its config"),  # type: ignore[arg-type]
    "model name": (lambda: PagedPQCache("gpt2"), "AutoConfig.from_pretrained"),  # type: ignore[arg-type]
    "exact cache of a model": (lambda: PagedKVCache(MODEL), "pass its config"),  # type: ignore[arg-type]
    "settings": (lambda: PagedPQCache(CONFIG, None, {"num_bits": 8}), r"got dict: pass PQConfig\(\*\*settings\)"),  # type: ignore[arg-type]
    "calibrate a name": (lambda: calibrate("gpt2", None, "text"), r"AutoModelForCausalLM\.from_pretrained\('gpt2'\)"),
    "calibrate with a name": (lambda: calibrate(MODEL, "gpt2", "text"), r"AutoTokenizer\.from_pretrained"),
    "perplexity": (lambda: perplexity(MODEL, None, "text", mode="stream", codebook="c"), "from_pretrained"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_kind_is_named_with_the_right_one(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
