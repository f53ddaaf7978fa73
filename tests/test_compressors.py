"""Presses by themselves: what each keeps, against its paper's formula written out in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from press_inputs import COUNT, seen
from tiny_models import build
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_pqcache.compressors import queries
from hf_pqcache.compressors.expected_attention import ExpectedAttention
from hf_pqcache.compressors.parse import PRESSES, parse
from hf_pqcache.compressors.snapkv import SnapKV


def kept(press: Any, one: dict[str, Any]) -> Tensor:
    """Which tokens stay (B, H, n), told by values that are their numbers."""
    numbers = torch.arange(COUNT).float()[None, None, :, None].expand(*one["keys"].shape)
    with torch.no_grad():
        keys, found = press.compress(**{**one, "values": numbers})
    assert torch.equal(keys, one["keys"].gather(2, found.long()))
    return found[..., 0].long()


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.9, 0.999])
def test_as_many_stay_as_asked_for_in_their_order(name: str, ratio: float) -> None:
    found = kept(parse(f"{name}:{ratio}"), seen("llama"))
    assert found.shape == (2, 2, max(1, int(COUNT * (1 - ratio))))
    assert bool((found.diff(dim=2) > 0).all())


def test_small_keys_stay() -> None:
    one = seen("llama")
    norms = one["keys"].norm(dim=-1)
    found = kept(parse("knorm:0.5"), one)
    gone = torch.ones_like(norms).scatter(2, found, 0).bool()
    assert (norms.gather(2, found).amax(-1) <= norms.masked_fill(~gone, 1e9).amin(-1)).all()


def test_first_and_newest_tokens_stay() -> None:
    assert kept(parse("streaming-llm:0.75"), seen("llama"))[0, 0].tolist() == [0, 1, 2, 3, *range(79, 100)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2"])
def test_snapkv_asks_what_the_newest_queries_attend_to(name: str) -> None:
    one = seen(name)
    weights = one["attentions"][:, :, -16:].unflatten(1, (one["keys"].shape[1], -1)).mean(dim=(2, 3))[..., :-16]
    votes = torch.nn.functional.avg_pool1d(weights, 3, stride=1, padding=1)
    best = votes.topk(50 - 16, dim=2).indices.sort(dim=2).values
    found = kept(SnapKV(0.5, window=16, kernel=3), one)
    assert torch.equal(found, torch.cat([best, torch.arange(84, 100).expand(*best.shape[:2], 16)], dim=2))


def test_a_prompt_within_the_window_keeps_its_newest_tokens() -> None:
    assert kept(SnapKV(0.5, window=100), seen("llama"))[0, 0].tolist() == [*range(50, 100)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_expected_attention_is_that_of_queries_turned_to_each_position_to_come(name: str) -> None:
    """The mean of rotated normal distributions, position by position."""
    one = seen(name)
    module, head_dim = one["module"], one["keys"].shape[3]
    rotary = next(part for path, part in build(name, "eager").named_modules() if path.endswith("rotary_emb"))
    with torch.no_grad():
        query = queries.project(module, one["hidden_states"][:, 4:], head_dim)
        cos, sin = rotary(one["keys"], torch.arange(COUNT, COUNT + 30)[None])
        eye = torch.eye(head_dim)[None, None]
        turn = torch.stack(
            [
                apply_rotary_pos_emb(eye, eye, *(x[:, i : i + 1].expand(-1, head_dim, -1) for x in (cos, sin)))[0]
                for i in range(30)
            ]
        ).mean(0)
        mean = query.mean(2, keepdim=True) @ turn
        covariance = turn.mT @ torch.stack([torch.stack([head.T.cov(correction=0) for head in row]) for row in query]) @ turn
        keys = one["keys"].repeat_interleave(query.shape[1] // one["keys"].shape[1], dim=1)
        logits = (keys * mean).sum(-1) * head_dim**-0.5 + (keys @ covariance * keys).sum(-1) / head_dim / 2
        logits[..., :4] = float("-inf")
        weights = logits.softmax(-1).unflatten(1, (one["keys"].shape[1], -1)).mean(2) * one["values"].norm(dim=-1)
        scores = ExpectedAttention(0.5, future=30).scores(
            module, one["hidden_states"], one["keys"], one["values"], one["kwargs"]
        )
    assert torch.allclose(scores[..., 4:], weights[..., 4:], rtol=1e-3, atol=1e-5)
    assert (scores[..., :4] > scores[..., 4:].amax()).all()


def test_a_model_whose_queries_are_not_known_is_refused() -> None:
    module = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="use knorm or streaming-llm"):
        queries.project(module, torch.zeros(1, 100, 4), 4)


@pytest.mark.parametrize(("text", "match"), [("snap:0.5", "use one of"), ("knorm", "after a colon"), ("knorm:1", "below 1")])
def test_texts_that_name_no_press(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse(text)
