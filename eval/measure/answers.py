"""Prompts answered under caches, side by side, token by token, timed and weighed; knows no task and no result row."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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


class _Stopped(Exception):
    """Another of the answers came to nothing."""


class _Turns:
    """Lets threads work one at a time, each until it gives its turn away; every one has random numbers of its own."""

    def __init__(self, members: Sequence[int], device: torch.device) -> None:
        self.order, self.device = deque(members), device
        self.changed, self.is_over = threading.Condition(), False

    def wait(self, member: int) -> float:
        """Until it is the member's turn -> the seconds that took. Raises _Stopped when all is over."""
        begin = time.perf_counter()
        with self.changed:
            self.changed.wait_for(lambda: self.is_over or self.order[0] == member)
        if self.is_over:
            raise _Stopped
        return time.perf_counter() - begin

    def give(self, member: int) -> float:
        """Let all others have their turn -> the seconds that took."""
        if len(self.order) == 1:
            return 0.0
        is_cuda = self.device.type == "cuda"
        states = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if is_cuda else None
        with self.changed:
            self.order.rotate(-1)
            self.changed.notify_all()
        waited = self.wait(member)
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.device)
        return waited

    def leave(self, member: int, is_failed: bool) -> None:
        with self.changed:
            self.is_over = self.is_over or is_failed
            self.order.remove(member)
            self.changed.notify_all()


class _Clocked(TextStreamer):
    """Hands on pieces of text, and notes when each token came, by a clock that stands still while others have their turn."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None], give_turn: Callable[[], float]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.give_turn = show, give_turn
        self.moments: list[float] = []
        self.waited = 0.0

    def put(self, value: Any) -> None:
        is_prompt = self.next_tokens_are_prompt
        if not is_prompt:
            self.moments.append(time.perf_counter() - self.waited)
        super().put(value)
        if not is_prompt:
            self.waited += self.give_turn()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[Tensor, CacheSpec]],
    *,
    show: Callable[[int, str], None] = lambda i, text: None,
    **options: Any,
) -> list[Answer]:
    """`answer` for several prompts and caches at once: one token of each in turn. Takes its options, too.

    The last one runs in the calling thread: captured CUDA graphs belong to the thread that captured them, and an exact
    cache, which has none, is asked first.

    Args:
        show: called with the number of the answer and every piece of its text as it comes.
    """
    turns = _Turns(range(len(asked)), torch.device(model.device))

    def run(i: int) -> Answer:
        is_failed = True
        try:
            turns.wait(i)
            found = answer(
                model, tokenizer, *asked[i], show=lambda text: show(i, text), give_turn=lambda: turns.give(i), **options
            )
            is_failed = False
        finally:
            turns.leave(i, is_failed)
        return found

    last = len(asked) - 1
    with ThreadPoolExecutor(max(1, last)) as pool:
        others = [pool.submit(run, i) for i in range(last)]
        try:
            found = run(last)
        except _Stopped:
            found = None
        first = [future.result() for future in others]
    assert found is not None, "what stopped it has been raised"
    return [*first, found]


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    spec: CacheSpec,
    *,
    max_new_tokens: int,
    show: Callable[[str], None] = lambda text: None,
    give_turn: Callable[[], float] = lambda: 0.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Answer:
    """Generate after ids int64 (1, n) under a fresh cache of `spec`.

    Args:
        show: called with every piece of the text as it comes.
        give_turn: called after every token; the seconds that it says it took do not count.
        temperature: 0 is greedy. top_p: share of the probability that is sampled from. seed: of sampling.
    """
    ids = ids.to(model.device)
    cache = spec.make(model, ids.shape[1] + max_new_tokens)
    streamer = _Clocked(tokenizer, show, give_turn)
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
