"""One prompt answered under a cache, piece by piece as it comes, timed and weighed; knows no task and no result row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from hf_pqcache.eval.session.caches import CacheSpec, weigh
from hf_pqcache.models.names import cache_kwargs


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    Attributes:
        cache: the cache's label. tokens: ids of the answer. text: the answer.
        prompt_tokens: of the prompt. first_s: seconds to the first token. tokens_per_s: of those after it; None for one.
        kv_bytes: of the cache at the end, codebooks left out; codebook_bytes: those.
    """

    cache: str
    tokens: list[int]
    text: str
    prompt_tokens: int
    first_s: float
    tokens_per_s: float | None
    kv_bytes: int
    codebook_bytes: int


class _Clocked(TextStreamer):
    """Hands on pieces of text, and notes when each token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.moments.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    spec: CacheSpec,
    *,
    max_new_tokens: int,
    show: Callable[[str], None] = lambda text: None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Answer:
    """Generate after ids int64 (1, n) under a fresh cache of `spec`.

    Args:
        show: called with every piece of the text as it comes.
        temperature: 0 is greedy. top_p: share of the probability that is sampled from. seed: of sampling.
    """
    ids = ids.to(model.device)
    cache = spec.make(model, ids.shape[1] + max_new_tokens)
    streamer = _Clocked(tokenizer, show)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(seed)
    begin = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=pad if pad is not None else 0,
        **cache_kwargs(cache),
        **sampling,
    )
    new = out[0, ids.shape[1] :].tolist()
    moments = streamer.moments
    after = len(moments) - 1
    weight = weigh(cache, model, out.shape[1] - 1)
    return Answer(
        cache=spec.label,
        tokens=new,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=ids.shape[1],
        first_s=moments[0] - begin,
        tokens_per_s=after / (moments[-1] - moments[0]) if after > 0 else None,
        kv_bytes=weight.tokens,
        codebook_bytes=weight.shared,
    )


def prompt_ids(tokenizer: Any, turns: list[dict[str, str]], use_template: bool) -> Tensor:
    """Token ids int64 (1, n) of a conversation: in the model's chat template, or the texts as they stand.

    Raises ValueError for a template where the model has none, and for an empty prompt.
    """
    if use_template:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this model has no chat template: leave --template out")
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer("\n".join(turn["content"] for turn in turns), verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt has no token: write something")
    return torch.tensor([ids])


def same_tokens(a: list[int], b: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
