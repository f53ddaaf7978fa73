"""The ways in which `generate` and its users handle a cache, each ending in tokens and logits; shared by the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import assistant_of, build, padded, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_pqcache.cache.base import PagedCache
from hf_pqcache.models.names import cache_kwargs

PROMPT, NEW = 50, 10  # a page of the small caches is full at 36 tokens, and the next one while decoding


@dataclass
class Run:
    """One model and the way to make a cache for inputs whose rows begin with `starts` columns of padding."""

    name: str
    implementation: str
    new_cache: Callable[[list[int]], Any]
    length: int = PROMPT

    @property
    def model(self) -> Any:
        return build(self.name, self.implementation)

    def generate(self, cache: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = self.model.generate(**inputs, **cache_kwargs(cache), **(settings | options))
        return out.sequences, list(out.logits)

    def plain(self, **options: Any) -> tuple[Tensor, list[Tensor]]:
        return self.generate(self.new_cache([0]), {"input_ids": tokens(2, self.length)}, **options)

    def padded(self, **options: Any) -> tuple[Tensor, list[Tensor]]:
        inputs, starts = padded(2, self.length)
        return self.generate(self.new_cache(starts), inputs, **options)

    def one(self, **options: Any) -> tuple[Tensor, list[Tensor]]:
        ids = tokens(1, self.length)
        ids[:, self.length // 2 :] = ids[:, : self.length - self.length // 2]  # something for prompt lookup to find
        return self.generate(self.new_cache([0]), {"input_ids": ids}, **options)


SAMPLING = {"do_sample": True, "temperature": 2.0, "top_k": 20}


def assisted(run: Run) -> tuple[Tensor, list[Tensor]]:
    return run.one(assistant_model=assistant_of(run.name, run.implementation), max_new_tokens=20)


def embeddings(run: Run) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        inputs = run.model.get_input_embeddings()(tokens(2, run.length))
    mask = torch.ones(2, run.length, dtype=torch.long)
    return run.generate(run.new_cache([0]), {"inputs_embeds": inputs, "attention_mask": mask})


def turns(run: Run, *, is_padded: bool = False, only_new: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Three turns with one cache: the whole conversation, or only what it has not seen, is passed each time."""
    inputs, starts = padded(2, run.length) if is_padded else ({"input_ids": tokens(2, run.length)}, [0])
    cache, logits = run.new_cache(starts), []
    for turn in range(3):
        sequences, more = run.generate(cache, inputs, max_new_tokens=6)
        logits += more
        added = tokens(2, (5, 1, 0)[turn], seed=10 + turn)
        ids = torch.cat([sequences, added], dim=1) if not only_new else torch.cat([sequences[:, -1:], added], dim=1)
        total = cache.get_seq_length() + 1 + added.shape[1]
        mask = torch.ones(2, total, dtype=torch.long)
        for row, start in enumerate(starts):
            mask[row, :start] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    return sequences, logits


def reset_and_again(run: Run) -> tuple[Tensor, list[Tensor]]:
    """A cache after `reset` is as a fresh one; the plain caches are fresh (DynamicCache cannot reset in 5.17)."""
    cache = run.new_cache([0])
    if isinstance(cache, PagedCache):
        run.generate(cache, {"input_ids": tokens(2, run.length + 7, seed=5)})
        cache.reset()
        assert cache.get_seq_length() == 0
    return run.generate(cache, {"input_ids": tokens(2, run.length)})


def prefix_copied(run: Run) -> tuple[Tensor, list[Tensor]]:
    """generate's recipe for a shared prompt: a deep copy of its cache for each question."""
    cache, prefix, logits = run.new_cache([0]), tokens(2, run.length), []
    with torch.no_grad():
        run.model(prefix, **cache_kwargs(cache))
    for seed in (5, 6, 5):
        ids = torch.cat([prefix, tokens(2, 4, seed)], dim=1)
        sequences, more = run.generate(copy.deepcopy(cache), {"input_ids": ids})
        logits += more
    return sequences, logits


def rows_moved(run: Run) -> tuple[Tensor, list[Tensor]]:
    """The three ways to move rows, by hand, a step of the model after each; also to another number of rows and back."""
    inputs, starts = padded(2, run.length)
    cache, logits = run.new_cache(starts), []
    mask = inputs["attention_mask"]
    moves: list[tuple[Callable[[Any], None], list[int]]] = [
        (lambda c: c.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
        (lambda c: c.reorder_cache(torch.tensor([3, 1, 5, 0, 0, 2])), [3, 1, 5, 0, 0, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([4, 0])), [4, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False])), [0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0]),
    ]
    with torch.no_grad():
        run.generate(cache, inputs, max_new_tokens=1)  # which says that what its mask hides is padding
        for i, (move, rows) in enumerate(moves):
            move(cache)
            mask = torch.nn.functional.pad(mask[rows], (0, 4), value=1)
            logits.append(run.model(tokens(len(rows), 4, 20 + i), attention_mask=mask, **cache_kwargs(cache)).logits)
            for j in range(7):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                logits.append(run.model(tokens(len(rows), 1, 40 + j), attention_mask=mask, **cache_kwargs(cache)).logits)
    return mask, logits


def hand_made_mask(run: Run) -> tuple[Tensor, list[Tensor]]:
    """A 4-D mask that hides some past columns from some queries: the fused path must honour it, too."""
    cache, ids = run.new_cache([0]), tokens(2, run.length)
    mask = torch.tril(torch.ones(2, 1, run.length, run.length, dtype=torch.bool))
    mask[:, :, 8:, 5] = False
    step = torch.ones(2, 1, 1, run.length + 1, dtype=torch.bool)
    step[0, :, :, 3:30] = False
    if run.implementation == "eager":  # adds its mask to the scores
        mask, step = (torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in (mask, step))
    with torch.no_grad():
        first = run.model(ids, attention_mask=mask, **cache_kwargs(cache)).logits
        second = run.model(ids[:, :1], attention_mask=step, **cache_kwargs(cache)).logits
    return ids, [first, second]


Scenario = Callable[[Run], tuple[Tensor, list[Tensor]]]
SCENARIOS: dict[str, Scenario] = {
    "greedy": Run.plain,
    "greedy, padded": Run.padded,
    "sampling": lambda run: run.padded(**SAMPLING),
    "several sequences": lambda run: run.padded(**SAMPLING, num_return_sequences=3),
    "beams": lambda run: run.plain(num_beams=3, num_return_sequences=2),
    "beams, padded": lambda run: run.padded(num_beams=3),
    "assisted": assisted,
    "prompt lookup": lambda run: run.one(prompt_lookup_num_tokens=4, max_new_tokens=20),
    "turns": turns,
    "turns, padded": partial(turns, is_padded=True),
    "turns, only new ids": partial(turns, is_padded=True, only_new=True),
    "chunks": lambda run: run.plain(prefill_chunk_size=13),
    "chunks, padded": lambda run: run.padded(prefill_chunk_size=5),
    "embeddings": embeddings,
    "reset": reset_and_again,
    "deep copies": prefix_copied,
    "rows moved": rows_moved,
    "hand-made mask": hand_made_mask,
}


def is_supported(name: str, scenario: str) -> bool:
    """Whether transformers runs it at all; what it refuses for DynamicCache, too, is no case."""
    if scenario == "hand-made mask":  # hybrid models want one for each kind of layer; OPT counts positions in a 2-D mask
        return name != "opt" and all(type(layer) is DynamicLayer for layer in DynamicCache(config=build(name).config).layers)
    return not (scenario in ("assisted", "prompt lookup", "rows moved") and name in ("qwen3_next", "falcon_h1"))


def assert_same(scenario: Scenario, ours: Run, theirs: Run, tolerance: float = 1e-4) -> None:
    """Both end in the same tokens, and in logits that differ by `tolerance` at most.

    Skips what the installed transformers cannot do with its own cache, such as assisted decoding over sliding windows (5.17).
    """
    try:
        expected_tokens, expected = scenario(theirs)
    except (RuntimeError, ValueError):
        try:
            scenario(replace(theirs, new_cache=lambda starts: DynamicCache(config=theirs.model.config)))
        except (RuntimeError, ValueError) as own:
            pytest.skip(f"DynamicCache cannot do it: {own}")
        raise
    got_tokens, got = scenario(ours)
    assert torch.equal(got_tokens, expected_tokens)
    assert len(got) == len(expected)
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, i=step: f"step {i}: {text}")
