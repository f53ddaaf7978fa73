"""Pass-key recall: is a number that was hidden in a long text still found through a cache? Knows no particular cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.models.names import cache_kwargs

#: Things that keys are for; plain words that every tokenizer has.
NAMES = ("garden", "library", "harbour", "station", "museum", "kitchen", "tower", "bridge", "school", "market")


#: Tokens that an answer takes at most: five digits, a space, and what ends it.
ANSWER_TOKENS = 8


def check_recall(
    tokenizer: Any, filler: torch.Tensor, lengths: Sequence[int], depths: Sequence[float], limit: int | None
) -> None:
    """Raises ValueError unless prompts of these lengths hold a pass key and fit the model, and depths are from 0 to 1.

    Args:
        filler: int64 (N), what keys are to be hidden in. limit: tokens that the model can hold, None without an end.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths {list(depths)}: give one or more, from 0 (first) to 1 (last)")
    lengths_within(limit, lengths, ANSWER_TOKENS, "recall")
    least = 1 + max(sum(len(part) for part in _frame(tokenizer, name, "00000")) for name in NAMES)
    for tokens in lengths:
        if tokens < least:
            raise ValueError(
                f"recall at {tokens} tokens: the pass key and the question alone take {least - 1}; use {least} or more"
            )
        if filler.numel() < tokens:
            raise ValueError(f"recall at {tokens} tokens: the text to hide keys in has {filler.numel()}; give a longer one")


def _frame(tokenizer: Any, name: str, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the sentence that holds the key, and of the question."""

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    asked = f"\nWhat is the pass key for {name}? The pass key for {name} is"
    return encode(f" The pass key for {name} is {key}."), encode(asked)


def passkey_prompt(tokenizer: Any, filler: torch.Tensor, tokens: int, depth: float, seed: int) -> tuple[torch.Tensor, str]:
    """A prompt of `tokens` tokens with one pass key at `depth` (0 first, 1 last) and the question at its end.

    Args:
        filler: int64 (N), ordinary text to hide it in; a seeded stretch of it is used.

    Returns:
        ids int64 (1, tokens), and the five digits asked for.

    Raises ValueError for a prompt too short for the key and the question, a filler shorter than the prompt, and a depth
    that is none.
    """
    rng = random.Random(seed)
    name, key = rng.choice(NAMES), f"{rng.randrange(100000):05d}"
    fact, question = _frame(tokenizer, name, key)
    room = tokens - fact.numel() - question.numel()
    if room < 1 or not 0 <= depth <= 1:
        raise ValueError(f"a prompt of {tokens} tokens, a key at depth {depth}: use more than {tokens - room}, and 0 to 1")
    if filler.numel() < room:
        raise ValueError(f"the filler text has {filler.numel()} tokens and {room} are needed; pass a longer text")
    begin = rng.randrange(filler.numel() - room + 1)
    text = filler[begin : begin + room]
    at = int(depth * room)
    return torch.cat([text[:at], fact, text[at:], question])[None], key


def question_tokens(tokenizer: Any, seed: int) -> int:
    """Tokens of the question at the end of a `passkey_prompt` of this seed."""
    name = random.Random(seed).choice(NAMES)
    return _frame(tokenizer, name, "00000")[1].numel()


@torch.inference_mode()
def recall_at(
    model: Any,
    tokenizer: Any,
    filler: torch.Tensor,
    make_cache: Callable[[], Any],
    *,
    tokens: int,
    depths: Sequence[float],
    seed: int = 0,
    progress: bool = False,
    question_after: bool = False,
) -> list[bool]:
    """For one pass key at each of `depths`, each with its own prompt: does greedy generation give it back?

    Args:
        filler: int64 (N), ordinary text to hide it in.
        make_cache: makes a fresh cache for every prompt.
        tokens: length of a prompt.
        question_after: whether the question is a turn of its own, which comes when the text is in the cache: what prunes the
            text does not know it yet.
    """
    found = []
    for i, depth in enumerate(tqdm(depths, desc=f"recall at {tokens}", leave=False, disable=not progress)):
        ids, key = passkey_prompt(tokenizer, filler, tokens, depth, seed + i)
        ids = ids.to(model.device)
        digits = len(tokenizer(" " + key, add_special_tokens=False)["input_ids"])
        cache = make_cache()
        if question_after:
            model(ids[:, : tokens - question_tokens(tokenizer, seed + i)], **cache_kwargs(cache, model), use_cache=True)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_kwargs(cache),
            max_new_tokens=digits + 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        found.append(tokenizer.decode(out[0, ids.shape[1] :]).strip().startswith(key))
    return found


def recall(
    model: Any,
    tokenizer: Any,
    text: str,
    make_cache: Callable[[], Any],
    *,
    tokens: int,
    count: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Share of `count` pass keys that greedy generation gives back, at depths spread evenly over the prompt."""
    filler = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    depths = [(i + 0.5) / count for i in range(count)]
    found = recall_at(model, tokenizer, filler, make_cache, tokens=tokens, depths=depths, seed=seed, progress=progress)
    return sum(found) / count
