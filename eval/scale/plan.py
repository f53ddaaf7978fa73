"""Conversations that one card keeps going, in closed form, and what bounds their number; measures nothing, knows no model.

People think, then ask: a closed network of M customers. With a turn every Z + R seconds (Z thinking, R until the answer is
there) each card sees X = M / (Z + R) turns a second (Little 1961), and B = X * (time of decoding) of them decode at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_pqcache.cache.footprint import layer_shapes, plan_memory

GIB = 1 << 30
#: Decode attention on an H100 (eval/RESULTS.md, Speed): microseconds of a launch, and the rest in times of copying its bytes.
LAUNCH_US = 6.5
OVER_COPY = {16: 0.98, 4: 1.06, 3: 1.21, 2: 1.57}
BITS = tuple(OVER_COPY)
#: The rest of a step, in times of copying the weights: whole steps of compiled `generate`, same place.
WEIGHTS_OVER_COPY = 1.6
#: Where conversations are that nobody decodes. The first keeps all on the card.
TIERS = ("device", "host", "disk")
#: Share of a host's memory and of a disk that is filled.
FILLED = 0.9
#: Conversations of a card that are still simulated in seconds.
MOST_SIMULATED = 10_000
#: Share of a link that transfers may use, so that they hardly wait for each other.
MOST_OF_LINK = 0.8


@dataclass(frozen=True)
class Card:
    """A card and its share of a server.

    Attributes:
        memory: bytes that the cache may take, weights and a tenth for activations already off.
        weights: bytes that each step reads once.
        copy: bytes a second of memory, as copying measures it.
        flops: that a prompt reaches, a second. host, disk: bytes of the card's share. host_link, disk_link: bytes a second.
        price: of an hour.
    """

    memory: float
    weights: float
    copy: float = 3.0e12
    flops: float = 4.0e14
    host: float = 256 * GIB * FILLED
    disk: float = 3840 * GIB * FILLED
    host_link: float = 5.0e10
    disk_link: float = 6.0e9
    price: float = 2.5


@dataclass(frozen=True)
class Use:
    """What people do. Tokens, seconds.

    Attributes:
        tokens: of a conversation. shared: of its first ones that all have in common, such as a system prompt.
        think: between an answer and the next question. question, answer: tokens of a turn.
        most: seconds from one token of an answer to the next.
    """

    tokens: int = 32768
    shared: int = 0
    think: float = 300.0
    question: int = 200
    answer: int = 300
    most: float = 0.05


@dataclass(frozen=True)
class Conversation:
    """What one conversation takes at a number of bits.

    Attributes:
        own: bytes of its own, the exact window included. common: bytes of what all share, once a card.
        launch: seconds that attention takes in a step whoever decodes. attention: that one token of it takes besides.
        question: seconds to read a question.
    """

    own: float
    common: float
    launch: float
    attention: float
    question: float


@dataclass(frozen=True)
class Answer:
    """A card's work.

    Attributes:
        conversations: that it keeps going. bound: what stops more.
        decoding: at once, on average. turns: a second. step: seconds from one token to the next.
        most: conversations that each bound by itself would allow.
    """

    conversations: int
    bound: str
    decoding: float
    turns: float
    step: float
    most: dict[str, int]

    def cards(self, conversations: int) -> int:
        return -(-conversations // self.conversations) if self.conversations else 0

    def cost(self, card: Card, use: Use) -> float:
        """Of a million tokens of answers."""
        return 1e6 * card.price / (3600 * self.turns * use.answer)


def card_of(config: Any, memory_gib: float = 79.0, weights: float | None = None, **changes: Any) -> Card:
    """A card that serves the model of a transformers config."""
    from hf_pqcache.eval.session.cards import LEFT, weight_bytes

    weights = weight_bytes(config) if weights is None else weights
    return Card(memory_gib * GIB * (1 - LEFT) - weights, weights, **changes)


def conversation(config: Any, bits: int, use: Use, card: Card) -> Conversation:
    """At 16 bits in transformers' cache, else in codes. Raises ValueError if the config does not say how large keys are."""
    name = "dynamic" if bits == 16 else f"pq:{bits}"
    whole = plan_memory(config, tokens=use.tokens)[name]
    common = plan_memory(config, tokens=use.shared)[name].stored if use.shared else 0
    layers = layer_shapes(config)
    numbers = sum(heads * (keys + values) for heads, keys, values in layers)
    exact = 2 * numbers * use.tokens
    # Several new tokens attend to the past as plain attention does: codes are read, written decoded, read again.
    past = 0 if bits == 16 else (whole.stored + 2 * exact) / card.copy
    question = use.question * card.weights / card.flops + past  # 2 FLOP a parameter, of 2 bytes each
    launch, all_rows = attention_of(bits, whole.stored / len(layers), card.copy)
    attention = len(layers) * (all_rows - launch) + whole.window / card.copy
    return Conversation(whole.total - common, common, len(layers) * launch, attention, question)


def attention_of(bits: int, nbytes: float, copy: float = 3.0e12) -> tuple[float, float]:
    """Seconds of decode attention over so many bytes of a layer, all rows together: of its launch alone, and in all."""
    return LAUNCH_US * 1e-6, LAUNCH_US * 1e-6 + OVER_COPY[bits] * nbytes / copy


def fixed(card: Card) -> float:
    """Seconds of a step without attention."""
    return WEIGHTS_OVER_COPY * card.weights / card.copy


def step_of(card: Card, one: Conversation, decoding: float, turns: float = 0.0) -> float:
    """Seconds of a step for so many at once, while `turns` questions a second are read in between."""
    return (fixed(card) + one.launch + decoding * one.attention) / max(1e-9, 1 - turns * one.question)


def work(card: Card, one: Conversation, use: Use, conversations: int, tier: str = "device") -> tuple[float, float, float]:
    """(decoding at once, turns a second, seconds a step) of a card with so many conversations, by halving.

    B decode at once: X = M / (Z + answer * step(B, X) + transfer), and B = X * answer * step(B, X).
    """
    transfer = transfer_of(card, one, tier)

    def turns_at(decoding: float) -> float:
        low, high = 0.0, min(conversations / use.think, (1 - 1e-9) / one.question)
        for _ in range(60):  # more turns make steps longer and so turns fewer
            middle = (low + high) / 2
            whole = use.think + transfer + use.answer * step_of(card, one, decoding, middle)
            low, high = (middle, high) if middle * whole < conversations else (low, middle)
        return low

    low, high = 0.0, float(conversations)
    for _ in range(60):
        middle = (low + high) / 2
        turns = turns_at(middle)
        low, high = (middle, high) if turns * use.answer * step_of(card, one, middle, turns) > middle else (low, middle)
    turns = turns_at(low)
    return low, turns, step_of(card, one, low, turns)


def transfer_of(card: Card, one: Conversation, tier: str) -> float:
    """Seconds that bringing a conversation to the card takes by itself."""
    return {"device": 0.0, "host": one.own / card.host_link, "disk": one.own / card.disk_link}[tier]


def answer(card: Card, one: Conversation, use: Use, tier: str = "device") -> Answer:
    """The most conversations of a card that keep within all bounds."""
    room = card.memory - one.common
    link = {"host": card.host_link, "disk": card.disk_link}.get(tier)
    place = {"device": room, "host": card.host, "disk": card.disk}[tier]
    most = {f"{tier} memory" if tier != "disk" else "disk": max(0, int(place / one.own))}
    most["time of a token"] = _most(lambda count: work(card, one, use, count, tier)[2] <= use.most)
    if tier != "device":
        most["device memory"] = _most(lambda count: work(card, one, use, count, tier)[0] * one.own <= room)
    if link is not None:
        most[f"{tier} link"] = _most(lambda count: work(card, one, use, count, tier)[1] * one.own <= MOST_OF_LINK * link)
    bound = min(most, key=lambda name: most[name])
    found = most[bound]
    return Answer(found, bound, *(work(card, one, use, found, tier) if found else (0.0, 0.0, 0.0)), most)


def _most(holds: Any, limit: int = 1 << 24) -> int:
    """The largest number below `limit` for which it holds; it holds for fewer, too."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def kinds(use: Use) -> Mapping[str, tuple[Use, str]]:
    """How a fleet can be built: each adds to the one before."""
    shared: Mapping[str, tuple[Use, str]] = {"and prefix shared": (use, "device")} if use.shared else {}
    first = {"all on the card": (replace(use, shared=0), "device")}
    return {**first, **shared, "and idle ones in host memory": (use, "host"), "or on disk": (use, "disk")}


def llama_8b() -> Any:
    """A config of the shape of Llama-3.1-8B: no Hub is asked."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=131072)


def table(config: Any, card: Card, use: Use, conversations: int = 10**6) -> list[dict[str, Any]]:
    """A row for each place of idle conversations and each number of bits."""
    rows: list[dict[str, Any]] = []
    for where, (used, tier) in kinds(use).items():
        for bits in BITS:
            one = conversation(config, bits, used, card)
            found = answer(card, one, used, tier)
            row = {"where": where, "bits": bits, "bytes": one.own, "per_card": found.conversations, "bound": found.bound}
            row |= {"cards": found.cards(conversations), "decoding": found.decoding, "step_ms": 1e3 * found.step}
            row |= {"turns_s": found.turns, "cost": found.cost(card, used) if found.turns else None}
            rows.append(row)
    return rows
