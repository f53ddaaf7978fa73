"""The name of the cache argument is that of the installed transformers, or of the model's own code where that is older."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from torch import nn
from transformers import DynamicCache

from hf_pqcache.models.names import CACHE, NAMES, cache_kwargs, output_cache


class Old(nn.Module):
    """A model's own code from before the renaming."""

    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return past_key_values


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any:
        return cache


class Wrapped(nn.Module):
    """Tells nothing: what transformers itself uses is the best guess."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs


@pytest.mark.parametrize("kind", [Old, New])
def test_a_model_gets_its_cache_under_the_name_it_knows(kind: type[nn.Module]) -> None:
    model, cache = kind(), DynamicCache()
    assert model(None, **cache_kwargs(cache, model)) is cache


def test_where_nothing_is_told_the_name_is_that_of_transformers() -> None:
    assert cache_kwargs(1) == cache_kwargs(1, Wrapped()) == cache_kwargs(1, torch.compile(build("llama"))) == {CACHE: 1}
    assert CACHE in NAMES


def test_no_warning_and_the_cache_is_used_and_returned() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model, cache = build("llama"), DynamicCache()
        outputs = model(tokens(1, 5), **cache_kwargs(cache, model))
        assert cache.get_seq_length() == 5
        assert output_cache(outputs) is cache
        assert output_cache(model(tokens(1, 5), use_cache=False)) is None
        options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        made = model.generate(tokens(1, 5), **cache_kwargs(cache := DynamicCache()), **options)
        assert output_cache(made) is cache
