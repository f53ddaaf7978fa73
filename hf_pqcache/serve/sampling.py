"""How each request of a batch chooses its next token; knows transformers' processor list for continuous batching.

transformers samples a whole batch alike (`do_sample`), and its processors take temperature, top_k and top_p only. Here one
processor stands for all: it returns scores whose largest is the token to take, so that the engine runs with
`do_sample=False`. Where a request samples, Gumbel noise is added to its scores, made from its seed, its step and the token
alone: what a request draws does not depend on who shares its batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Rows of the int32 table of arguments, a column for each request of the batch; floats lie there bit by bit.
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTS = ("top_k", "seed_low", "seed_high", "step", "slot", "is_counted", "is_held")
SLOT = len(FLOATS) + INTS.index("slot")
#: Rows of scores that are worked on at once: several tables of the vocabulary's length are made for each.
CHUNK = 32
#: What a request's history says of a token, in 15 bits: how often it was generated, and two flags.
COUNT, IN_PROMPT, ENDS = 0x1FFF, 0x2000, 0x4000


@dataclass(eq=False)
class Sampling:
    """What a request asks for.

    Attributes:
        temperature: 0 takes the likeliest token. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        repetition_penalty: of tokens in the prompt or generated; presence_penalty, frequency_penalty: of generated ones.
        min_tokens: before so many, none of `ends` is taken. seed: 64 bits.
        ends: token ids that end the request.
        slot: of its history, if it has one; `Sampler.take` says which, in one process for all that compute the same steps.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int = 0
    ends: tuple[int, ...] = ()
    slot: int | None = field(default=None, init=False)

    @property
    def has_history(self) -> bool:
        """Whether its scores depend on the tokens before, for which it takes a slot."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0)
        return any(penalties) or (self.min_tokens > 0 and bool(self.ends))

    @property
    def is_plain(self) -> bool:
        """Whether the model's largest score is its token."""
        return self.temperature == 0 and not self.has_history

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampling:
        """The engine copies what belongs to a request when it begins it anew: the slot must stay the same one."""
        return self


PLAIN = Sampling(temperature=0.0)


class Sampler:
    """In place of transformers' `ContinuousBatchingLogitsProcessorList`; a request's argument `sampling` is a `Sampling`.

    Args:
        vocab_size: columns of the scores. slots: most requests with a history at a time. device: where the scores are.
        stream: the engine's stream on a device, once there is one.
    """

    do_processing = True
    tensors_required = len(FLOATS) + len(INTS)

    def __init__(self, vocab_size: int, slots: int, device: torch.device, stream: Callable[[], Any] = lambda: None) -> None:
        self.slots, self.stream = slots, stream
        #: (slots + 1, vocab_size): requests without a history share the last row, which says nothing.
        self.history = torch.zeros(slots + 1, vocab_size, dtype=torch.int16, device=device)
        self.hashes = _mix(torch.arange(vocab_size, device=device))
        self.free, self.taken = list(range(slots)), set[Sampling]()
        self.lock = threading.Lock()
        #: Whether the batch in preparation takes the largest scores as they are; CUDA graphs differ by it.
        self.is_plain = True

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Called with each new request's arguments. Raises TypeError for what is not ours: the request fails."""
        if not all(name == "sampling" and isinstance(value, Sampling) for name, value in kwargs.items()):
            raise TypeError(f"a request takes sampling=Sampling(...) and nothing else here, got {sorted(kwargs)}")

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """int32 (rows, 1): what padding has."""
        int32_tensor.copy_(self._columns([(PLAIN, 0, False)]))

    def take(self, sampling: Sampling) -> None:
        """Give a request with a history a slot, of which there must be one. Called from any thread."""
        with self.lock:
            sampling.slot = self.free.pop()
            self.taken.add(sampling)

    def release(self, sampling: Sampling) -> None:
        """The request is over, or has been cancelled: another one may have its slot, and begins by overwriting it.

        A step that is under way may still write there; it comes before the other's first. Called from any thread.
        """
        with self.lock:
            if sampling in self.taken:
                self.taken.remove(sampling)
                assert sampling.slot is not None
                self.free.append(sampling.slot)

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Write the arguments of the next step's requests into int32 (rows, columns). In the engine's thread."""
        states = [future.state for future in requests_in_batch if future.has_new_token]
        asked = [state.logit_processor_kwargs.get("sampling", PLAIN) for state in states]
        self.is_plain = all(sampling.is_plain for sampling in asked)
        if self.is_plain:
            return arg_storage
        columns = []
        for state, sampling in zip(states, asked, strict=True):
            prompt = state._true_initial_tokens or len(state.initial_tokens)  # it differs where a request began anew
            is_first = state.position_offset == len(state.initial_tokens)
            if sampling.has_history and is_first:
                self._begin_history(sampling, state.initial_tokens[:prompt], state.initial_tokens[prompt:])
            columns.append((sampling, state.position_offset - prompt, not is_first))
        arg_storage[SLOT] = self.slots  # in columns that nobody has
        arg_storage[:, : len(columns)] = self._columns(columns).to(arg_storage.device)
        return arg_storage

    def _columns(self, requests: Sequence[tuple[Sampling, int, bool]]) -> Tensor:
        """(sampling, tokens generated before, whether the last one is yet to be counted) of N -> int32 (rows, N)."""
        floats = [[getattr(sampling, name) for name in FLOATS] for sampling, _, _ in requests]
        ints = [
            [
                sampling.top_k,
                _signed(sampling.seed),
                _signed(sampling.seed >> 32),
                step,
                self.slots if sampling.slot is None else sampling.slot,
                is_counted,
                step < sampling.min_tokens,
            ]
            for sampling, step, is_counted in requests
        ]
        return torch.cat([torch.tensor(floats).view(torch.int32), torch.tensor(ints, dtype=torch.int32)], dim=1).T

    def _begin_history(self, sampling: Sampling, prompt: list[int], generated: list[int]) -> None:
        """Write what has been before the next token."""
        if (slot := sampling.slot) is None:
            return
        row = torch.zeros(self.history.shape[1], dtype=torch.int64)
        if generated:
            row += torch.bincount(torch.tensor(generated), minlength=len(row)).clamp(max=COUNT)
        words = [token for token in prompt if token < len(row)]  # the others are of images
        row[torch.tensor(words, dtype=torch.long)] += IN_PROMPT
        row[list(sampling.ends)] += ENDS
        stream = self.stream()
        with nullcontext() if stream is None else torch.cuda.stream(stream):  # after the steps that still use the slot
            self.history[slot].copy_(row)

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Last tokens (N), float32 scores (N, vocab_size), int32 (rows, N) -> scores to take the largest of."""
        if self.is_plain:
            return scores
        parts = zip(*(x.split(CHUNK, dim=-1) for x in (input_ids, logits_processor_args)), scores.split(CHUNK), strict=True)
        return torch.cat([self._choose(*part) for part in parts])

    def _choose(self, tokens: Tensor, table: Tensor, scores: Tensor) -> Tensor:
        names = dict(zip((*FLOATS, *INTS), table.unsqueeze(-1), strict=True))
        args = {name: row.view(torch.float32) if name in FLOATS else row.long() for name, row in names.items()}
        scores = self._penalised(tokens.long(), scores, args)
        temperature = args["temperature"]
        warm = _cut(scores / temperature.clamp(min=1e-5), args)
        return torch.where(temperature > 0, warm + self._noise(args, scores.shape[1]), scores)

    def _penalised(self, tokens: Tensor, scores: Tensor, args: dict[str, Tensor]) -> Tensor:
        """Count the last tokens; then lower the scores of those that have been, and of ends that come too early."""
        slot = args["slot"].squeeze(-1)
        before = self.history[slot, tokens]
        is_counted = (args["is_counted"].squeeze(-1) > 0) & (before & COUNT < COUNT) & (slot < self.slots)
        self.history[slot, tokens] = before + is_counted.to(before.dtype)
        history = self.history[slot, : scores.shape[1]]
        count = history & COUNT
        has_been = (count > 0) | (history & IN_PROMPT > 0)
        factor = torch.where(has_been, args["repetition_penalty"], 1.0)
        scores = torch.where(scores > 0, scores / factor, scores * factor)
        scores = scores - args["frequency_penalty"] * count - args["presence_penalty"] * (count > 0)
        return scores.masked_fill((history & ENDS > 0) & (args["is_held"] > 0), -math.inf)

    def _noise(self, args: dict[str, Tensor], vocab_size: int) -> Tensor:
        """Gumbel noise float32 (N, vocab_size) by seed, step and token."""
        key = _mix(_mix(args["seed_low"]) ^ args["seed_high"])
        key = _mix(key ^ _mix(args["step"] + 0x9E3779B9))
        bits = _mix(_mix(self.hashes[:vocab_size] ^ key) + key)
        uniform = (bits.float() + 0.5) * 2.0**-32
        return -torch.log(-torch.log1p(-uniform))


def _cut(scores: Tensor, args: dict[str, Tensor]) -> Tensor:
    """Scores (N, vocab_size) without those that top_k, then top_p of what is left, then min_p leave out."""
    vocab_size = scores.shape[1]
    best = scores.sort(dim=-1, descending=True).values
    top_k = torch.where(args["top_k"] > 0, args["top_k"], vocab_size).clamp(max=vocab_size)
    least = best.gather(1, top_k - 1)
    probabilities = best.masked_fill(best < least, -math.inf).softmax(-1)
    kept = (probabilities.cumsum(-1) - probabilities < args["top_p"]).sum(-1, keepdim=True).clamp(min=1)
    least = torch.where(args["top_p"] < 1, torch.maximum(least, best.gather(1, kept - 1)), least)
    least = torch.maximum(least, best[:, :1] + args["min_p"].log())
    return scores.masked_fill(scores < least, -math.inf)


def _mix(x: Tensor) -> Tensor:
    """int64 -> 32 bits in which each of the lowest 32 bits of x has its part (Ettinger's lowbias32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _signed(number: int) -> int:
    """The lowest 32 bits as an int32 has them."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
