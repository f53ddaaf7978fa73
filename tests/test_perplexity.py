"""Exact perplexity is the textbook one; the two simulations are what their names say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.codebook import pq
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval.measure.deployed import cache_perplexity
from hf_pqcache.eval.measure.perplexity import perplexity, simulated_attention, stream_attention
from hf_pqcache.eval.session.models import load_model

CONFIG = PQConfig(num_subspaces=8, num_bits=4, page_size=16, sink_tokens=2, extended_residual=20)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=20, sliding_window=24),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=24),
}
IDS = torch.randint(0, 64, (300,), generator=torch.Generator().manual_seed(0))


def build(name: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation)
    for module in model.modules():  # sharp attention, so that what is attended to matters
        if hasattr(module, "q_proj"):
            torch.nn.init.normal_(module.q_proj.weight, std=0.5)
            torch.nn.init.normal_(module.k_proj.weight, std=0.5)
            torch.nn.init.normal_(module.v_proj.weight, std=0.5)
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    return model.eval()


def random_codebook(sets: int = 1) -> Codebook:
    """sets: 1 is normalised, 8 is MILLION's, a set for each subspace."""
    generator = torch.Generator().manual_seed(1)
    return Codebook(*(torch.randn(sets, 16, 2, generator=generator).mul(0.5).half() for _ in range(2)))


BOOKS = {"shipped": None, "own": random_codebook(), "MILLION": random_codebook(8)}


def textbook(model: Any, ids: torch.Tensor, window: int, stride: int) -> float:
    """The strided loop of transformers' own guide, with token counts exact."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = ids[begin:end].clone()
        labels[: previous - begin] = -100
        with torch.no_grad():
            logits = model(ids[None, begin:end]).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum").item()
        count += int((labels[1:] != -100).sum())
        previous = end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 16), (100, 99), (300, 300), (1000, 500)])
def test_exact_is_the_usual_strided_perplexity(window: int, stride: int) -> None:
    model = build("llama", "sdpa")
    result = perplexity(model, None, IDS, window=window, stride=stride, progress=False)
    assert result.value == pytest.approx(textbook(model, IDS, window, stride), rel=1e-4)
    if stride < window:
        assert result.tokens == len(IDS) - 1  # every token but the first, once


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_stream_with_nothing_coded_is_exact(name: str, implementation: str, book: str) -> None:
    if name in ("gemma2", "gpt_oss") and implementation == "sdpa":
        pytest.skip("transformers has no soft-capped sdpa and none with sinks")
    model = build(name, implementation)
    settings: dict[str, Any] = {"window": 100, "max_windows": 2, "progress": False}
    exact = perplexity(model, None, IDS, **settings)
    wide = CONFIG.replace(extended_residual=200)
    stream = perplexity(model, None, IDS, mode="stream", codebook=BOOKS[book], config=wide, **settings)
    assert stream.value == pytest.approx(exact.value, rel=1e-5)
    coded = perplexity(model, None, IDS, mode="stream", codebook=BOOKS[book], config=CONFIG, **settings)
    assert coded.value != pytest.approx(exact.value, rel=1e-5)


@pytest.mark.parametrize("capped", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_stream_attention_equals_one_query_at_a_time(capped: float | None, with_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 90, 16, generator=generator)
    k, v, ck, cv = (torch.randn(1, 2, 90, 16, generator=generator) for _ in range(4))
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    out = stream_attention(q, (k, v), (ck, cv), CONFIG, scale=0.4, softcap=capped, sinks=sinks, sliding_window=60)
    for t in range(90):
        begin, end = CONFIG.sink_tokens, CONFIG.sink_tokens + CONFIG.coded_tokens(t + 1)
        keys, values = k[:, :, : t + 1].clone(), v[:, :, : t + 1].clone()
        keys[:, :, begin:end], values[:, :, begin:end] = ck[:, :, begin:end], cv[:, :, begin:end]
        keys, values = (x.repeat_interleave(2, 1)[:, :, max(0, t - 59) :] for x in (keys, values))
        scores = (q[:, :, t : t + 1] @ keys.transpose(2, 3)) * 0.4
        scores = torch.tanh(scores / capped) * capped if capped else scores
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, 4, 1, 1)], -1)
        probs = scores.softmax(-1)[..., : keys.shape[2]]
        torch.testing.assert_close(out[:, :, t : t + 1], probs @ values, rtol=1e-4, atol=1e-5)


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 1, 2, 70, 16)
    whole = stream_attention(x[0], (x[1], x[2]), (x[3], x[4]), CONFIG, scale=0.3)
    monkeypatch.setattr("hf_pqcache.eval.measure.perplexity._SCORE_NUMBERS", 1)
    torch.testing.assert_close(stream_attention(x[0], (x[1], x[2]), (x[3], x[4]), CONFIG, scale=0.3), whole)


def test_stream_honours_a_mask() -> None:
    x = torch.randn(5, 1, 2, 40, 16)
    seen = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    seen[..., 5:, 3] = False
    arguments = (x[0], (x[1], x[2]), (x[3], x[4]), CONFIG)
    by_bool = stream_attention(*arguments, scale=0.3, mask=seen)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(stream_attention(*arguments, scale=0.3, mask=added), by_bool)
    assert not torch.allclose(stream_attention(*arguments, scale=0.3), by_bool)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_distort_as_million_has_it_attends_to_decoded_keys_and_values(implementation: str) -> None:
    """Compared with a model whose attention function decodes codes itself, registered the official way."""
    model = build("llama", implementation)
    book = random_codebook(8)
    result = perplexity(model, None, IDS, window=100, mode="distort", codebook=book, progress=False)

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (pq.decode(pq.encode(x, side), side) for x, side in ((k, book.keys), (v, book.values)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    name = "test_distort_reference"
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        model.config._attn_implementation = name
        assert result.value == pytest.approx(textbook(model, IDS, 100, 100), rel=1e-4)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def test_the_attention_function_is_put_back_even_after_an_error() -> None:
    model = build("llama", "sdpa")
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with simulated_attention(model, None, CONFIG, "distort"):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before[1]
        model(IDS[None, :4], use_cache=False)
    with pytest.raises(RuntimeError), simulated_attention(model, None, CONFIG, "distort"):
        model(IDS[None, :4].view(1, 2, 2), use_cache=False)
    assert (dict(ALL_ATTENTION_FUNCTIONS._local_mapping), ALL_ATTENTION_FUNCTIONS["sdpa"]) == before
    with (
        pytest.raises(ValueError, match="never called"),
        simulated_attention(model, None, CONFIG, "stream"),
    ):
        pass


def test_bad_input_names_the_way_out() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="at least two"):
        perplexity(model, None, IDS[:1], progress=False)
    with pytest.raises(ValueError, match="stride from 1"):
        perplexity(model, None, IDS, window=10, stride=11, progress=False)
    with pytest.raises(ValueError, match="use one of"):
        perplexity(model, None, IDS, mode="quick", progress=False)  # type: ignore[arg-type]
    book = Codebook(torch.zeros(1, 16, 3).half(), torch.zeros(1, 16, 2).half())
    with pytest.raises(ValueError, match="3 numbers fits no keys of 16"):
        perplexity(model, None, IDS, mode="distort", codebook=book, progress=False)


@pytest.mark.parametrize("book", ["shipped", "own"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_stream_is_what_a_cache_computes_token_by_token(name: str, book: str) -> None:
    model, window = build(name), 90
    options: dict[str, Any] = {"window": window, "max_windows": 2, "progress": False}

    def make(tokens: int, rows: int) -> Any:
        return ReferenceCache(model.config, BOOKS[book], CONFIG)

    run = cache_perplexity(model, IDS, make, chunk=1, **options)
    simulated = perplexity(model, None, IDS, mode="stream", codebook=BOOKS[book], config=CONFIG, **options)
    assert simulated.value == pytest.approx(run, rel=1e-4)
    assert simulated.config is not None
    assert simulated.config["num_subspaces"] == 8


def test_distort_codes_whole_pages_and_nothing_else() -> None:
    """A window of sinks and less than a page is exact; one token more makes a page, which every query sees as codes."""
    model, page = build("llama"), CONFIG.sink_tokens + CONFIG.page_size
    for window, is_exact in ((page - 1, True), (page, False)):
        options: dict[str, Any] = {"window": window, "max_windows": 1, "progress": False}
        exact = perplexity(model, None, IDS, **options)
        distorted = perplexity(model, None, IDS, mode="distort", config=CONFIG, **options)
        assert (distorted.value == pytest.approx(exact.value, rel=1e-6)) == is_exact


def test_heads_that_no_codebook_cuts_stay_exact_as_in_the_cache() -> None:
    config = LlamaConfig(**{**SIZES, "head_dim": 6})
    model = AutoModelForCausalLM.from_config(config).eval()
    options: dict[str, Any] = {"window": 100, "max_windows": 1, "progress": False}
    plain = PQConfig(page_size=16, extended_residual=20)
    assert perplexity(model, None, IDS, mode="distort", config=plain, **options).value == pytest.approx(
        perplexity(model, None, IDS, **options).value
    )


def test_real_model_loses_little_and_less_with_more_bits() -> None:
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu")
    text = TEXT.read_text(encoding="utf-8")
    common: dict[str, Any] = {"window": 1024, "max_windows": 1, "progress": False}

    def rise(mode: Any, bits: int) -> float:
        found = perplexity(model, tokenizer, text[-20000:], mode=mode, config=PQConfig(bits=bits), **common)
        return found.value / exact.value - 1

    exact = perplexity(model, tokenizer, text[-20000:], **common)
    # Short articles owe little to far context, so a stream figure is near zero at any bits: order shows in distort.
    assert abs(rise("stream", 4)) < 0.01
    assert 0 < rise("distort", 4) < rise("distort", 2) < 0.2
