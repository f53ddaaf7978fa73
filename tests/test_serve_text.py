"""Texts of a stream: in parts or at once the same, whole characters, nothing past a stop string."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_pqcache import demo
from hf_pqcache.serve.text import BROKEN, Detokenizer, TextStream

TEXTS = ("The owl is a bird.", "naïve café — 日本語 🦉🦉", "é" * 7, "\n\n  two  spaces\t")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL)


def whole(ids: list[int]) -> str:
    return str(tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def parts_of(stream: Detokenizer | TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(token) for token in ids), stream.flush()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40) | st.sampled_from(TEXTS).map(lambda text: tokenizer()(text)["input_ids"]))
def test_parts_are_the_whole(ids: list[int]) -> None:
    assert "".join(parts_of(Detokenizer(tokenizer()), ids)) == whole(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_part_has_half_a_character(text: str) -> None:
    assert not any(BROKEN in part for part in parts_of(Detokenizer(tokenizer()), tokenizer()(text)["input_ids"]))


def test_what_is_broken_at_the_end_is_told_there() -> None:
    ids = tokenizer()("🦉")["input_ids"][:-1]
    assert parts_of(Detokenizer(tokenizer()), ids)[-1].count(BROKEN) >= 1


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab \n🦉é", max_size=30),
    st.lists(st.text(alphabet="ab \n🦉é", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    full = whole(ids)
    ends = [
        (full.find(stop) + len(stop), full.find(stop)) for stop in stops if stop in full
    ]  # where they are complete, and begin
    stream = TextStream(tokenizer(), stops)
    shown = ""
    for part in parts_of(stream, ids):
        shown += part
        assert full.startswith(shown)
        assert not any(stop in shown for stop in stops)
    assert shown == (full[: min(ends)[1]] if ends else full)
    assert stream.is_stopped == bool(ends)


def test_of_two_stop_strings_the_first_to_be_complete_ends_the_text() -> None:
    """Whether the text comes in one piece or in many."""
    for text in ("a\na", "xa\nab"):
        ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert "".join(parts_of(TextStream(tokenizer(), ["\n", "a\na"]), ids)) == text.partition("\n")[0]


def test_stop_strings_wait_for_the_least_tokens() -> None:
    ids = tokenizer()("one two one two one two", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer(), ["two"], min_tokens=4)
    assert "".join(parts_of(stream, ids)).count("two") == 1
