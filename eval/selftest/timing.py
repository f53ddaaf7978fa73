"""Speed, bytes and tokens of caches side by side, briefly, on the embedded model; `pqcache compare` measures in earnest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_pqcache.eval.measure.speed import measure_speed
from hf_pqcache.eval.selftest.checks import REPORT, CheckFailed, Machine, expect
from hf_pqcache.eval.selftest.integration import Setup, setup
from hf_pqcache.eval.session.caches import CacheSpec, head_dim_of, weigh
from hf_pqcache.models.names import cache_kwargs

PERFORMANCE = ("dynamic", "static", "pq:4", "paged-kv")
COMPARISON = ("dynamic", "fp8", "quanto:4", "hqq:4", "paged-kv", "pq:4", "pq:3", "pq:2")
#: Share of tokens that caches which lose nothing must have in common with DynamicCache: all, but for ties in float16.
LOSSLESS = {"static": 0.9, "paged-kv": 0.9}
TOKENS, NEW_TOKENS = 1024, 32


@dataclass(frozen=True)
class Figures:
    """What was measured of one cache; None where it could not be, `note` says why.

    Attributes:
        kv_bytes: of TOKENS tokens, codebooks aside.
        tokens_per_s, ttft_ms: of `generate` after a prompt of TOKENS tokens.
        agreement: share of tokens predicted as under DynamicCache, given the same tokens before them.
    """

    cache: str
    kv_bytes: int | None = None
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    agreement: float | None = None
    note: str = ""


def measure(names: Sequence[str], machine: Machine) -> Iterator[Figures]:
    """Figures of each cache in `names`, as `CacheSpec.parse` reads them.

    Raises CheckFailed where a cache that loses nothing does not predict what DynamicCache does.
    """
    s = setup(machine.device)
    prompt = s.prompt(1, TOKENS)["input_ids"]
    mask = torch.ones_like(prompt)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    exact = CacheSpec("dynamic").make(s.model, TOKENS)
    continued = s.model.generate(prompt, attention_mask=mask, **cache_kwargs(exact), **options)
    for name in names:
        spec = CacheSpec.parse(name, head_dim_of(s.config))
        try:
            spec.make(s.model, TOKENS)
        except ImportError as error:
            yield Figures(spec.label, note=str(error))
            continue
        yield _measure(s, spec, continued)


def _measure(s: Setup, spec: CacheSpec, continued: torch.Tensor) -> Figures:
    def fresh() -> Any:
        return spec.make(s.model, TOKENS + NEW_TOKENS)

    cache, predicted = fresh(), []
    with torch.inference_mode():
        logits = s.model(continued[:, :TOKENS], **cache_kwargs(cache), logits_to_keep=1).logits
        weight = weigh(cache, s.model, TOKENS)
        for t in range(TOKENS, TOKENS + NEW_TOKENS):
            predicted.append(logits[0, -1].argmax())
            logits = s.model(continued[:, t : t + 1], **cache_kwargs(cache)).logits
    agreement = float((torch.stack(predicted) == continued[0, TOKENS:]).float().mean())
    wanted = LOSSLESS.get(spec.name, 0.0)
    expect(agreement >= wanted, f"{spec.label} to predict {wanted:.0%} of the tokens of DynamicCache", f"{agreement:.0%}")
    speed = measure_speed(s.model, fresh, prompt_tokens=TOKENS, new_tokens=NEW_TOKENS, repeats=2)
    if not speed.tokens_per_s > 0:
        raise CheckFailed("a positive speed", str(speed), REPORT)
    return Figures(spec.label, weight.tokens, round(speed.ttft_ms, 2), round(speed.tokens_per_s, 2), agreement)
