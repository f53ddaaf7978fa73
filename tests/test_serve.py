"""The server over HTTP, as clients use and misuse it: right texts, right refusals, and nobody disturbs anybody."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from served import GREEDY, PROMPTS, Served, answers_of_generate, crowd, eventually, is_idle, served, tiny

from hf_pqcache.serve.manager import EngineSettings
from hf_pqcache.serve.server import Running
from hf_pqcache.serve.service import Limits

pytestmark = pytest.mark.usefixtures("one_thread")
#: (status, field, code, fields of a completion)
WRONG: list[tuple[int, str | None, str | None, dict[str, Any]]] = [
    (400, "prompt", None, {}),
    (400, "prompt", None, {"prompt": ""}),
    (400, "prompt", None, {"prompt": [4096]}),
    (400, "prompt", None, {"prompt": [-1]}),
    (400, "prompt", None, {"prompt": [2**70]}),
    (400, "prompt", None, {"prompt": [[1], []]}),
    (400, "prompt", None, {"prompt": "\ud800"}),
    (400, "prompt", "context_length_exceeded", {"prompt": [5] * 5000}),
    (400, "max_tokens", "context_length_exceeded", {"prompt": [5] * 4000, "max_tokens": 1000}),
    (400, "stop_token_ids", None, {"prompt": "a", "stop_token_ids": [4096]}),
    (400, "logprobs", "unsupported_parameter", {"prompt": "a", "logprobs": 0}),
    (404, "model", "model_not_found", {"prompt": "a", "model": "another"}),
    (400, "n", None, {"prompt": ["a"] * 33, "n": 2}),
]


@pytest.fixture(scope="module", params=["4", "stock"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(variant: str) -> Iterator[Served]:
    """A request that shares the beginning of another one reads its codes, where `generate` computes: not so here."""
    with served(Limits(queue=64, body_bytes=100_000), variant=variant, shares_prefixes=variant == "stock") as found:
        yield found


@pytest.fixture(scope="module")
def expected(variant: str) -> dict[str, list[int]]:
    return answers_of_generate(variant)


def test_texts_are_those_of_generate(server: Served, expected: dict[str, list[int]]) -> None:
    texts = {prompt: server.decoded(ids) for prompt, ids in expected.items()}
    assert server.texts(prompt=list(PROMPTS), **GREEDY) == list(texts.values())
    ids = [server.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert server.texts(prompt=ids, n=2, **GREEDY) == [text for text in texts.values() for _ in range(2)]
    answer = server.completions(prompt=ids[0], model="tiny", **GREEDY).json()
    assert (answer["object"], answer["model"], answer["choices"][0]["finish_reason"]) == ("text_completion", "tiny", "length")
    assert answer["usage"] == {"prompt_tokens": len(ids[0]), "completion_tokens": 24, "total_tokens": len(ids[0]) + 24}


def test_a_stream_is_the_same_in_parts(server: Served, expected: dict[str, list[int]]) -> None:
    events = server.events(prompt=list(PROMPTS), stream_options={"include_usage": True}, **GREEDY)
    usage = events.pop()
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 96)
    texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i) for i in range(4)]
    assert texts == [server.decoded(expected[prompt]) for prompt in PROMPTS]
    assert all(event["usage"] is None and event["id"] == usage["id"] for event in events)
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]] == ["length"] * 4
    assert "usage" not in server.events(prompt="a", max_tokens=1)[0]
    told = server.events(
        prompt="a", max_tokens=3, temperature=0, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    assert [event["usage"]["completion_tokens"] for event in told] == [1, 2, 3, 3]


def test_chat(server: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    body = {"messages": messages, "max_completion_tokens": 8, "temperature": 0}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    (text,) = server.texts(prompt="user: hello\nassistant:", max_tokens=8, temperature=0)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    events = server.events("/v1/chat/completions", **body, n=2)
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"][0]["index"] == 1]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert ("".join(delta.get("content", "") for delta in deltas), deltas[-1]) == (text, {})
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


@pytest.mark.parametrize("cut", [(0, 1), (3, 9), (10, 11), (17, 30), (40, 48)])
def test_stop_strings_across_tokens(server: Served, expected: dict[str, list[int]], cut: tuple[int, int]) -> None:
    full = server.decoded(expected[PROMPTS[0]])
    stop = full[slice(*cut)]
    wanted = full[: full.index(stop)]
    body = {"prompt": PROMPTS[0], "stop": ["never said", stop], **GREEDY}
    answer = server.completions(**body).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (wanted, "stop")
    assert answer["usage"]["completion_tokens"] <= 24
    assert "".join(event["choices"][0]["text"] for event in server.events(**body)) == wanted
    assert eventually(lambda: is_idle(server))


def test_ends_of_texts(server: Served, expected: dict[str, list[int]]) -> None:
    ids = expected[PROMPTS[0]]
    end = ids[5]
    before = ids[: ids.index(end)]
    body = {"prompt": PROMPTS[0], "stop_token_ids": [end], **GREEDY}
    answer = server.completions(**body).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (server.decoded(before), "stop")
    assert answer["usage"]["completion_tokens"] == len(before) + 1
    assert "".join(event["choices"][0]["text"] for event in server.events(**body)) == server.decoded(before)
    longer = server.completions(**body, min_tokens=12).json()
    assert longer["usage"]["completion_tokens"] >= 12
    server.service.ends = (end,)
    try:
        assert server.texts(prompt=PROMPTS[0], **GREEDY) == [server.decoded(before)]
        assert server.texts(prompt=PROMPTS[0], ignore_eos=True, **GREEDY) == [server.decoded(ids)]
    finally:
        server.service.ends = (0,)


def test_a_stop_string_that_is_a_special_token_ends_at_that_token(server: Served, expected: dict[str, list[int]]) -> None:
    ids = expected[PROMPTS[0]]
    server.service.special = {"<|end|>": ids[5]}
    body = {"prompt": PROMPTS[0], "stop": "<|end|>", "ignore_eos": True, **GREEDY}
    assert server.texts(**body) == [server.decoded(ids[: ids.index(ids[5])])]
    server.service.special = {}


def test_a_seed_draws_the_same_whoever_else_is_there(server: Served) -> None:
    body = {"prompt": PROMPTS[1], "max_tokens": 24, "temperature": 1.2, "top_p": 0.95, "seed": 5}
    alone = server.texts(**body, n=3)
    assert len(set(alone)) == 3
    with_others = server.texts(**{**body, "prompt": [PROMPTS[1], PROMPTS[0]]}, n=3)
    assert with_others[:3] == alone
    assert server.texts(**{**body, "seed": 6}) == alone[1:2]
    assert server.texts(prompt=PROMPTS[1], max_tokens=24) != server.texts(prompt=PROMPTS[1], max_tokens=24)


@pytest.mark.parametrize(("status", "field", "code", "body"), WRONG)
def test_refusals(server: Served, status: int, field: str | None, code: str | None, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    answer = server.client.post("/v1/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, field, code)
    assert error["message"]
    assert is_idle(server)


def status_of_long(client: httpx.Client, content: Any) -> int:
    """413, also where the server has closed before all of the body was sent, and the answer with it is lost."""
    try:
        return client.post("/v1/completions", content=content).status_code
    except (httpx.ReadError, httpx.WriteError):
        return 413


def test_other_paths_and_bodies(server: Served) -> None:
    client = server.client
    assert status_of_long(client, b"x" * 100_001) == 413
    assert status_of_long(client, iter([b"x" * 60_000] * 3)) == 413
    assert client.post("/v1/completions", content=b"{").status_code == 400
    assert client.post("/v1/embeddings", json={}).status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", server.service.context)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/a/b").status_code == 404
    for answer in (client.get("/v1/embeddings"), client.get("/v1/completions"), client.get("/v1/models/a/b")):
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_cancelled(server: Served, stream: bool) -> None:
    before = server.metric('pqcache_requests_total{outcome="cancelled"}')
    body = {"prompt": PROMPTS[0], "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 3}
    with httpx.Client(base_url=server.url, timeout=0.5) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert len(list(zip(range(5), answer.iter_lines(), strict=False))) == 5
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body)
    assert eventually(lambda: is_idle(server))
    assert server.metric('pqcache_requests_total{outcome="cancelled"}') == before + 3


def test_an_error_of_the_engine_reaches_whom_it_is_about(
    server: Served, variant: str, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of a request that the door should have refused; transformers' own blocks would end the engine."""
    if variant == "stock":
        return
    monkeypatch.setattr(server.service, "context", 10**6)
    found: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            found.append(client.post("/v1/completions", json={"prompt": [5] * 9000, "stream": stream}))

    askers = [threading.Thread(target=ask, args=[stream]) for stream in (False, True)]
    for asker in askers:
        asker.start()
    assert server.texts(prompt=PROMPTS[2], **GREEDY) == [server.decoded(expected[PROMPTS[2]])]
    for asker in askers:
        asker.join()
    for answer in found:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "[PQC001]" in error["message"]
    assert eventually(lambda: is_idle(server))


def test_a_full_queue_asks_to_come_back(server: Served) -> None:
    long = {"prompt": PROMPTS[0], "max_tokens": 4000, "ignore_eos": True, "stream": True, "n": 63}
    with server.client.stream("POST", "/v1/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = server.completions(prompt="a", n=2)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert refused.headers["retry-after"]
    assert eventually(lambda: is_idle(server))
    assert server.completions(prompt="a", n=2).status_code == 200


def test_metrics(server: Served) -> None:
    names = ("pqcache_generated_tokens_total", "pqcache_prompt_tokens_total", "pqcache_time_to_first_token_seconds_count")
    names += ("pqcache_time_per_output_token_seconds_count", "pqcache_prefix_hit_tokens_total")
    prompt = [7] * 40
    server.completions(prompt=prompt, max_tokens=2)
    before = [server.metric(name) for name in names]
    server.completions(prompt=prompt, max_tokens=5)
    hits = 32 if server.service.engine and server.service.engine.cache.use_prefix_sharing else 0
    assert [server.metric(name) - b for name, b in zip(names, before, strict=True)] == [5, 40, 1, 1, hits]
    assert server.metric("pqcache_blocks_free") + server.metric("pqcache_blocks_used") == 256
    assert server.metric('pqcache_http_responses_total{path="/v1/completions",status="200"}') > 0
    assert server.metric("pqcache_requests_running ") == server.metric("pqcache_requests_waiting ") == 0


def test_a_crowd_with_cancels_and_malformed_requests(server: Served, expected: dict[str, list[int]]) -> None:
    asyncio.run(crowd(server, expected, clients=16, seconds=2))


def test_a_pool_that_is_too_small_for_all_serves_one_after_the_other(variant: str, expected: dict[str, list[int]]) -> None:
    with served(cache_tokens=320, max_requests=3, variant=variant, shares_prefixes=False) as server:
        most = server.client.get("/v1/models").json()["data"][0]["max_model_len"]
        assert most == server.service.context >= 320
        assert server.completions(prompt=[5] * 80, max_tokens=most - 79).status_code == 400
        asked = PROMPTS[::-1] + PROMPTS[2:]
        assert server.texts(prompt=asked, **GREEDY) == [server.decoded(expected[prompt]) for prompt in asked]
        assert len(server.texts(prompt=[5] * (most - 8), max_tokens=8, temperature=0)) == 1


def test_keys_and_the_way_up() -> None:
    model, tokenizer = tiny()
    may_load = threading.Event()

    def load() -> tuple[Any, Any]:
        may_load.wait()
        return model, tokenizer

    running = Running(load, "tiny", EngineSettings("stock", 64, 16), Limits(), api_key="secret")
    statuses: list[int] = []

    def ask_early() -> None:
        with httpx.Client(base_url=running.url) as early:
            statuses.append(early.get("/health").status_code)
            statuses.append(early.post("/v1/completions", json={}, headers={"Authorization": "Bearer secret"}).status_code)
        may_load.set()

    asking = threading.Thread(target=ask_early)
    asking.start()
    with running.background() as url, httpx.Client(base_url=url) as client:
        asking.join()
        assert statuses == [503, 503]
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer"}):
            answer = client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        right = {"Authorization": "Bearer secret"}
        assert client.post("/v1/completions", json={"prompt": "a"}, headers=right).status_code == 200


def test_what_cannot_be_loaded_is_raised() -> None:
    def load() -> Any:
        raise OSError("no such model")

    running = Running(load, "tiny", EngineSettings("stock"), Limits())
    with pytest.raises(OSError, match="no such model"), running.background():
        pass


def test_an_engine_that_dies_tells_everybody() -> None:
    with served(variant="stock") as server:
        engine = server.service.engine
        assert engine is not None

        def fail(*args: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("no memory for this step")

        body = {"prompt": PROMPTS[0], "max_tokens": 4000, "ignore_eos": True}
        with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.manager.batch_processor._generation_step = fail
            rest = [line for line in lines if line]
        assert "no memory for this step" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert rest[-1] == "data: [DONE]"
        assert eventually(lambda: server.client.get("/health").status_code == 503)
        answer = server.completions(**body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


@pytest.mark.parametrize(("drain_s", "reason"), [(60.0, "length"), (0.3, None)])
def test_the_end_lets_running_requests_finish_up_to_a_limit(drain_s: float, reason: str | None) -> None:
    with served(Limits(drain_s=drain_s), variant="stock") as server:
        body = {"prompt": PROMPTS[0], "max_tokens": 200 if reason else 4000, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.service.is_draining = True
            refused = httpx.post(f"{server.url}/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            server.drain()
            rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]"
    last = json.loads(rest[-2])
    assert last["choices"][0]["finish_reason"] == reason if reason else last["error"]["code"] == "draining"
