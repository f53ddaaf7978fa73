"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654, section 3), generated here: no download. Knows no cache.

Needles in a haystack (single, several keys, values or queries), variable tracking, common and frequent words. Its question
answering, which needs data, is in `ruler_qa`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

#: What repeats where a haystack is noise.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_FIRST: tuple[str, ...] = (
    "amber",
    "brisk",
    "calm",
    "dusty",
    "eager",
    "faint",
    "gentle",
    "humble",
    "icy",
    "jolly",
    "keen",
    "lively",
    "misty",
)
_FIRST += ("noble", "odd", "plain", "quiet", "rapid", "shy", "tidy")
_SECOND: tuple[str, ...] = (
    "anchor",
    "basket",
    "candle",
    "dolphin",
    "engine",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
)
_SECOND += ("ladder", "mirror", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "tunnel", "urchin", "violin")
_SECOND += ("wagon", "yarn", "zipper")


@dataclass(frozen=True)
class Example:
    """prompt: ends where the answer begins. answers: all of them must appear."""

    prompt: str
    answers: tuple[str, ...]


#: Makes an example of so many units of filler, of a text where it takes one.
Make = Callable[[random.Random, int, str], Example]
#: Where doubling ends for a task that runs out of filler.
MOST_UNITS = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One task: how an example is made of so many units of filler, and the tokens of its answer."""

    make: Make
    new_tokens: int
    about: str


def _key(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _keys(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_key(rng) + (f"-{len(found)}" if len(found) >= 200 else "")] = None
    return list(found)


def _needles(keys: int, values: int, queries: int, haystack: str) -> Callable[[random.Random, int, str], Example]:
    """A task of the needle family. haystack: "noise", "text" or "needles"."""

    def make(rng: random.Random, units: int, text: str) -> Example:
        extra = units if haystack == "needles" else 0
        names = _keys(rng, keys + extra)
        told = {name: [_number(rng) for _ in range(values)] for name in names}
        sentences = [f"One of the special magic numbers for {n} is: {v}." for n in names for v in told[n]]
        if haystack == "needles":
            lines = sentences
            rng.shuffle(lines)
        else:
            words = text.split()
            begin = rng.randrange(len(words)) if haystack == "text" else 0
            filler = [words[(begin + i) % len(words)] for i in range(20 * units)]
            lines = [NOISE] * units if haystack == "noise" else [" ".join(filler[20 * i : 20 * i + 20]) for i in range(units)]
            for place, sentence in sorted(((rng.randrange(units + 1), s) for s in sentences), reverse=True):
                lines.insert(place, sentence)
        asked = rng.sample(names[:keys] if haystack != "needles" else names, queries)
        query = asked[0] if queries == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
        plural = values * queries > 1
        what, verb = ("numbers", "are") if plural else ("number", "is")
        prompt = (
            f"Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
            f"about the numbers afterwards.\n{chr(10).join(lines)}\nWhat {verb} all the special magic {what} for {query} "
            f"mentioned in the provided text? The special magic {what} for {query} mentioned in the provided text {verb}"
        )
        return Example(prompt, tuple(v for name in asked for v in told[name]))

    return make


def _variables(rng: random.Random, units: int, text: str) -> Example:
    """One chain of five variables with one value, in noise."""
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    lines = [NOISE] * units
    places = sorted(rng.randrange(units + 1) for _ in chain)
    for place, step in reversed(list(zip(places, chain, strict=True))):  # from the back, so that their order stays
        lines.insert(place, step)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{chr(10).join(lines)}\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
        f"According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, "
        "they are:"
    )
    return Example(prompt, tuple(names))


def _common_words(rng: random.Random, units: int, text: str) -> Example:
    """Ten words 30 times each, among words that come three times."""
    words = _keys(rng, 10 + units)
    listed = [word for word in words[:10] for _ in range(30)] + [word for word in words[10:] for _ in range(3)]
    rng.shuffle(listed)
    numbered = " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{numbered}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
        "words that appear most often in the list are:"
    )
    return Example(prompt, tuple(words[:10]))


def _frequent_words(rng: random.Random, units: int, text: str) -> Example:
    """Coded words in Zipf's proportions (alpha 2); the three most frequent but the first, which is noise."""
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(50)]
    total = 20 * units
    counts = [int(total / (rank + 1) ** 2 / 1.6449) + (rank < 4) for rank in range(len(words))]
    coded = [("..." if rank == 0 else words[rank]) for rank, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(coded)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
        f"coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
        "the three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
        "three most frequently appeared words are:"
    )
    return Example(prompt, tuple(words[1:4]))


KINDS: dict[str, Kind] = {
    "niah_single_1": Kind(_needles(1, 1, 1, "noise"), 128, "one number in repeated noise"),
    "niah_single_2": Kind(_needles(1, 1, 1, "text"), 128, "one number in text"),
    "niah_multikey_1": Kind(_needles(4, 1, 1, "text"), 128, "one of four numbers in text"),
    "niah_multikey_2": Kind(_needles(1, 1, 1, "needles"), 128, "one number among numbers"),
    "niah_multivalue": Kind(_needles(1, 4, 1, "text"), 128, "four numbers of one key in text"),
    "niah_multiquery": Kind(_needles(4, 1, 4, "text"), 128, "four keys' numbers in text"),
    "vt": Kind(_variables, 30, "variable tracking"),
    "cwe": Kind(_common_words, 120, "common words"),
    "fwe": Kind(_frequent_words, 50, "frequent words"),
}


def examples(task: str, tokenizer: Any, tokens: int, count: int, seed: int, text: str) -> list[Example]:
    """`count` examples whose prompts have at most `tokens` tokens, and nearly as many.

    Args:
        text: haystack of the tasks that hide needles in text.

    Raises ValueError for an unknown task and a length that holds no example.
    """
    if task not in KINDS:
        raise ValueError(f"RULER has no task {task!r} here; use one of {', '.join(KINDS)}")
    return fitted(task, KINDS[task].make, tokenizer, tokens, count, seed, text)


def fitted(task: str, make: Make, tokenizer: Any, tokens: int, count: int, seed: int, text: str = "") -> list[Example]:
    """`examples` of a task by how it is made."""

    def made(units: int, index: int) -> Example:
        return make(random.Random(f"{task} {seed} {index}"), units, text)

    def fits(units: int, index: int) -> bool:
        return len(tokenizer(made(units, index).prompt, verbose=False)["input_ids"]) <= tokens

    found = []
    for index in range(count):
        low, high = 1, 2
        if not fits(low, index):
            raise ValueError(f"{task} at {tokens} tokens: even its shortest prompt is longer; use a greater length")
        while high <= MOST_UNITS and fits(high, index):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, index) else (low, middle)
        found.append(made(low, index))
    return found


def score(prediction: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that appear, letters of any case: RULER's string_match_all."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)
