"""What clients ask: every field is taken or refused by its name, whatever else a body holds."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pqcache.serve.errors import ApiError
from hf_pqcache.serve.protocol import UNDONE, job_of, parse

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
#: (field at fault, fields)
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [1.5]}),
    ("prompt", {"prompt": [True]}),
    ("prompt", {"prompt": [[1], "a"]}),
    ("prompt", {"prompt": ["a"] * 2000}),
    ("n", {"n": 0}),
    ("n", {"n": 1.0}),
    ("n", {"n": 10**400}),
    ("best_of", {"best_of": 3}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_completion_tokens", {"max_completion_tokens": -1}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": -0.1}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 2}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("presence_penalty", {"presence_penalty": float("inf")}),
    ("frequency_penalty", {"frequency_penalty": []}),
    ("seed", {"seed": 2**64}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"stop": [1]}),
    ("stop_token_ids", {"stop_token_ids": ["a"]}),
    ("stream", {"stream": 1}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream": True, "stream_options": []}),
    ("include_usage", {"stream": True, "stream_options": {"include_usage": "yes"}}),
    ("ignore_eos", {"ignore_eos": "no"}),
    ("model", {"model": 5}),
    *((name, {name: "something"}) for name in UNDONE),
]
WRONG_CHATS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", "hello"),
    ("messages[0]", [5]),
    ("messages[0]", [{"content": "a"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]),
    ("messages[1].content", [{"role": "user", "content": "a"}, {"role": "user", "content": [5]}]),
]


@pytest.mark.parametrize(("name", "fields"), WRONG, ids=lambda value: None if isinstance(value, str) else repr(value)[:40])
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_wrong_field_is_named(name: str, fields: dict[str, Any], is_chat: bool) -> None:
    if is_chat and name == "prompt":
        return
    with pytest.raises(ApiError) as caught:
        job_of({**(CHAT if is_chat else {"prompt": "a"}), **fields}, is_chat)
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize(("name", "messages"), WRONG_CHATS)
def test_a_wrong_message_is_named(name: str, messages: Any) -> None:
    with pytest.raises(ApiError) as caught:
        job_of({"messages": messages}, is_chat=True)
    assert (caught.value.status, caught.value.param) == (400, name)


def test_what_clients_send_is_taken() -> None:
    """vLLM's and guidellm's benchmarks, OpenAI's library with its nulls."""
    sent = {"model": "m", "prompt": [1, 2], "temperature": 0, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None}
    sent |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True}
    sent |= {"stop": None, "min_tokens": 8, "user": "me", "top_k": -1, "n": 1, "echo": False, "nobody_knows": 1}
    job = job_of(parse(json.dumps(sent).encode()), is_chat=False)
    assert (job.prompts, job.max_tokens, job.min_tokens, job.includes_usage) == ([[1, 2]], 8, 8, True)
    assert job.sampling == {"temperature": 0.0, "repetition_penalty": 1.0, "top_k": 0}


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert job_of({"messages": [{"role": "user", "content": parts}]}, is_chat=True).messages == CHAT["messages"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"1", b'{"n": ' + b"1" * 5000 + b"}"])
def test_what_is_no_json_object_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(data)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = sorted({name for name, _ in WRONG} | {"prompt", "messages", "chat_template_kwargs"})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6), st.booleans())
def test_any_body_is_taken_or_refused(body: dict[str, Any], is_chat: bool) -> None:
    with suppress(ApiError):
        job_of(parse(json.dumps(body).encode()), is_chat)
