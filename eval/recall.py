"""Pass-key recall: is a number that was hidden in a long text still found through a cache? Knows no particular cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_pqcache.hf_names import cache_kwargs

#: Things that keys are for; plain words that every tokenizer has.
NAMES = ("garden", "library", "harbour", "station", "museum", "kitchen", "tower", "bridge", "school", "market")


def passkey_prompt(tokenizer: Any, filler: torch.Tensor, tokens: int, depth: float, seed: int) -> tuple[torch.Tensor, str]:
    """A prompt of about `tokens` tokens with one pass key at `depth` (0 first, 1 last) and the question at its end.

    Args:
        filler: int64 (N), ordinary text to hide it in; a seeded stretch of it is used.

    Returns:
        ids int64 (1, n), and the five digits asked for.
    """
    rng = random.Random(seed)
    name, key = rng.choice(NAMES), f"{rng.randrange(100000):05d}"

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    fact = encode(f" The pass key for {name} is {key}.")
    question = encode(f"\nWhat is the pass key for {name}? The pass key for {name} is")
    room = max(0, tokens - fact.numel() - question.numel())
    if filler.numel() < room:
        raise ValueError(f"the filler text has {filler.numel()} tokens and {room} are needed; pass a longer text")
    begin = rng.randrange(filler.numel() - room + 1)
    text = filler[begin : begin + room]
    at = int(depth * room)
    return torch.cat([text[:at], fact, text[at:], question])[None], key


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
) -> list[bool]:
    """For one pass key at each of `depths`, each with its own prompt: does greedy generation give it back?

    Args:
        filler: int64 (N), ordinary text to hide it in.
        make_cache: makes a fresh cache for every prompt.
        tokens: length of a prompt.
    """
    found = []
    for i, depth in enumerate(tqdm(depths, desc=f"recall at {tokens}", leave=False, disable=not progress)):
        ids, key = passkey_prompt(tokenizer, filler, tokens, depth, seed + i)
        ids = ids.to(model.device)
        digits = len(tokenizer(" " + key, add_special_tokens=False)["input_ids"])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_kwargs(make_cache()),
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
