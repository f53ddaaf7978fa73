"""What attention masks say about tokens: left padding is not stored, everything else is, whatever a mask hides for now."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import COMMON, SMALL, build, padded, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import flash_attention_mask

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.attention import functions, padding
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
IN_WINDOW = SMALL.replace(extended_residual=128)


def cache_for(model: Any, kind: str = "codes") -> Any:
    """Exact: codes do not begin within 128 tokens, or pages hold tokens as they are."""
    if kind == "pages":
        return PagedKVCache(model.config, page_size=16)
    return PagedPQCache(model.config, None, IN_WINDOW)


def exact_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def as_mask(allowed: Tensor, implementation: str) -> Tensor:
    """bool (B, heads or 1, T, n), True where a query attends -> what the implementation takes."""
    if implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


Pass = dict[str, Any]


def assert_same(model: Any, cache: Any, passes: list[Pass]) -> None:
    """Logits of all visible positions are DynamicCache's; `visible` of a pass (B, T) tells which, None means all."""
    exact = exact_cache(model)
    for i, inputs in enumerate(passes):
        visible = inputs.pop("visible", None)
        with torch.no_grad():
            want, got = (model(**inputs, **cache_kwargs(c, model)).logits for c in (exact, cache))
        if visible is not None:
            want, got = want[visible], got[visible]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text, i=i: f"pass {i}: {text}")
        assert cache.get_seq_length() == exact.get_seq_length()


def assert_same_generation(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    """Logits of a few new tokens are DynamicCache's."""
    options |= {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    outputs = [model.generate(**inputs, **options, **cache_kwargs(c)) for c in (cache, exact_cache(model))]
    torch.testing.assert_close(*(torch.stack(out.logits) for out in outputs), rtol=1e-4, atol=1e-4)


def starts(cache: Any) -> list[int]:
    """How many columns of each row were taken for padding."""
    found: list[int] = cache.storage.lengths.left_pad
    return found


@pytest.mark.parametrize("kind", ["codes", "pages"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["restarting", "going on", "none"])
def test_documents_side_by_side(implementation: str, positions: str, kind: str) -> None:
    """Each sees itself; the question that follows sees all."""
    model, sizes = build("llama", implementation), (17, 12, 9)
    total = sum(sizes)
    block = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes)).bool()
    passes: list[Pass] = [{"input_ids": tokens(2, total), "attention_mask": as_mask(block[None, None], implementation)}]
    if positions == "restarting":
        passes[0]["position_ids"] = torch.cat([torch.arange(size) for size in sizes])[None]
    elif positions == "going on":
        passes[0]["position_ids"] = torch.arange(total)[None]
    for step, count in enumerate((5, 1, 1)):
        seen = torch.ones(count, total + count).tril(total).bool()
        passes.append({"input_ids": tokens(2, count, seed=step), "attention_mask": as_mask(seen[None, None], implementation)})
        total += count
    cache = cache_for(model, kind)
    assert_same(model, cache, passes)
    assert starts(cache) == [0, 0]


def test_a_mask_that_hides_nothing() -> None:
    """Eager attention adds a bool mask to the scores: what looks like padding is attended to."""
    model = build("llama", "eager")
    mask = torch.ones(1, 1, 20, 20).tril().bool()
    mask[..., :5] = False
    positions = (torch.arange(20) - 5).clamp(min=0)[None]
    passes = [{"input_ids": tokens(1, 20), "attention_mask": mask, "position_ids": positions}]
    cache = cache_for(model)
    assert_same(model, cache, [*passes, {"input_ids": tokens(1, 1)}])
    assert starts(cache) == [0]


def test_a_document_that_only_one_head_sees() -> None:
    model = build("llama", "sdpa")
    block = torch.ones(1, 4, 30, 30).tril().bool()
    block[:, 1:, :, :8] = False
    block[:, 0, 8:, :8] = False
    passes = [{"input_ids": tokens(1, 30), "attention_mask": block, "position_ids": torch.arange(30)[None]}]
    passes += [{"input_ids": tokens(1, count, seed=count)} for count in (3, 1)]
    assert_same(model, cache_for(model), passes)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [4, 30])
def test_tokens_that_are_hidden_now_and_shown_later(name: str, implementation: str, chunk: int) -> None:
    """By a 2-D mask; the first chunk of four may be hidden as a whole."""
    model, ids = build(name, implementation), tokens(2, 36)
    mask, ones = torch.ones(2, 36, dtype=torch.long), torch.ones(2, 36, dtype=torch.long)
    mask[0, :7], mask[1, :3] = 0, 0
    borders = [*range(0, 30, chunk), 30]
    passes: list[Pass] = [
        {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "visible": mask[:, a:b].bool()}
        for a, b in itertools.pairwise(borders)
    ]
    passes += [{"input_ids": ids[:, 30:33], "attention_mask": ones[:, :33]}]
    passes += [{"input_ids": ids[:, i : i + 1], "attention_mask": ones[:, : i + 1]} for i in range(33, 36)]
    cache = cache_for(model)
    assert_same(model, cache, passes)
    assert starts(cache) == [0, 0], "positions counted them"


@pytest.mark.parametrize("chunk", [2, 4, 30])
@pytest.mark.parametrize("is_told", [True, False])
def test_padding_that_a_caller_of_the_model_passes(chunk: int, is_told: bool) -> None:
    """With positions that do not count it, it is known as padding, unless it fills a whole chunk; else it is stored."""
    model = build("llama", "sdpa")
    inputs, pads = padded(2, 30, step=7)
    mask = inputs["attention_mask"]
    passes: list[Pass] = []
    for a in range(0, 30, chunk):
        b = min(30, a + chunk)
        passes.append({"input_ids": inputs["input_ids"][:, a:b], "attention_mask": mask[:, :b], "visible": mask[:, a:b] == 1})
        if is_told:
            passes[-1]["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, a:b]
    for step in range(3):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        passes.append({"input_ids": tokens(2, 1, seed=step), "attention_mask": mask})
        if is_told:
            passes[-1]["position_ids"] = mask.sum(-1, keepdim=True) - 1
    cache = cache_for(model)
    assert_same(model, cache, passes)
    assert starts(cache) == (pads if is_told and chunk == 30 else [0, 0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_padding_of_generate_is_not_stored(name: str, chunk: int | None) -> None:
    """Whether attention is told positions or not, and where a chunk has nothing but padding."""
    if name == "qwen3_next" and chunk:
        pytest.skip("transformers runs no chunks through its linear layers")
    model = build(name)
    inputs, pads = padded(2, 20)
    cache = cache_for(model)
    assert_same_generation(model, cache, inputs, prefill_chunk_size=chunk)
    assert starts(cache) == pads
    cache.reset()
    with torch.no_grad():
        model(**inputs, **cache_kwargs(cache, model))
    # A call of the model itself: its positions tell. OPT counts in its mask, and so passes over what is hidden.
    assert starts(cache) == (pads if name == "opt" else [0, 0])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["none", "2-D", "4-D"])
def test_padding_that_is_shown_later_is_refused(count: int, implementation: str, kind: str) -> None:
    model = build("llama", implementation)
    cache = cache_for(model)
    inputs, _ = padded(2, 30)
    model.generate(**inputs, **cache_kwargs(cache), max_new_tokens=1)
    ids, mask = tokens(2, count), torch.ones(2, 30 + count, dtype=torch.long)
    shown: dict[str, Any] = {"2-D": {"attention_mask": mask}, "none": {}}.get(kind, {})
    if kind == "4-D":
        allowed = torch.ones(count, 30 + count).tril(30).bool().expand(2, 1, -1, -1).clone()
        allowed[1, ..., :6] = False  # all but the last column of its padding
        shown = {"attention_mask": as_mask(allowed, implementation)}
    with pytest.raises(ValueError, match=r"row 1.*left padding.*reset"), torch.no_grad():
        model(ids, **shown, **cache_kwargs(cache, model))
    assert cache.get_seq_length() == 30
    mask[1, :7] = 0
    exact = DynamicCache(config=model.config)
    model.generate(**inputs, **cache_kwargs(exact), max_new_tokens=1)
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask, **cache_kwargs(c, model)).logits for c in (cache, exact))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_masks_are_looked_at_once_in_a_pass_and_not_at_all_where_no_row_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("leading_padding", "refuse_shown"):
        inner = getattr(padding, name)
        monkeypatch.setattr(padding, name, lambda *args, inner=inner, name=name: (calls.append(name), inner(*args))[1])
    model = build("llama_deep")
    for inputs, expected in ((padded(2, 20)[0], ["refuse_shown"] * 3), ({"input_ids": tokens(2, 20)}, [])):
        calls.clear()
        model.generate(**inputs, **cache_kwargs(cache_for(model)), max_new_tokens=4)
        assert calls == ["leading_padding", *expected]


def test_a_flat_mask_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of flash attention, which a CPU lacks: ones and zeros (B, n), or None where there are only ones."""
    model = build("llama")

    def flat(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **options: Any) -> Any:
        count, total = q.shape[2], k.shape[2]
        allowed = torch.ones(count, total).tril(total - count).bool()[None, None]
        if mask is not None:
            assert mask.shape == (2, total)
            allowed = allowed & mask[:, None, None, :].bool()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(functions._LIBRARY, flat, functions.Known(has_weights=False, has_flat_mask=True))
    monkeypatch.setitem(tf.AttentionInterface._global_mapping, "flat", flat)
    monkeypatch.setitem(tf.AttentionMaskInterface._global_mapping, "flat", flash_attention_mask)
    monkeypatch.setattr(model.config, "_attn_implementation", "flat")
    inputs, pads = padded(2, 20)
    cache = cache_for(model)
    assert_same_generation(model, cache, inputs)
    assert starts(cache) == pads
    assert cache.stats()["calls"]["attend/torch"] > 0
    with pytest.raises(ValueError, match="left padding"), torch.no_grad():
        model(tokens(2, 1), **cache_kwargs(cache, model))


def doge() -> Any:
    """Its masks are its own: additive, for every head, of what values say."""
    torch.manual_seed(0)
    config = tf.DogeConfig(**COMMON | {"num_key_value_heads": 2}, keep_window_size=16)
    model = tf.DogeForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


def test_masks_of_every_head() -> None:
    """Doge hides all but the 16 columns that its values choose: those are no padding; padding is."""
    model = doge()
    inputs, pads = padded(2, 30)
    cache = cache_for(model)
    assert_same_generation(model, cache, inputs)
    assert starts(cache) == pads


def test_positions_of_three_kinds() -> None:
    """Models that look at images count time, height and width."""
    torch.manual_seed(0)
    text = {**COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    ids = {f"{name}_token_id": 120 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    model = tf.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    inputs, pads = padded(2, 30)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=100)
    cache = cache_for(model)
    assert_same_generation(model, cache, inputs)
    assert starts(cache) == pads


def test_padding_that_attention_is_never_shown_is_stored() -> None:
    """Falcon reads keys itself; its mask hides the padding that the cache holds like any token."""
    model, cache = build("falcon"), cache_for(build("falcon"))
    inputs, _ = padded(2, 30)
    assert_same_generation(model, cache, inputs)
    assert starts(cache) == [0, 0]
