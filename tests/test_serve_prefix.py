"""Which replica gets a request: equal beginnings the same one, few move when replicas come or go, and nobody drowns."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("starlette")
from hf_pqcache.serve.prefix import BEGINNING, SLACK, key_of, ranked, with_label


def key(**body: Any) -> str | None:
    return key_of(json.dumps(body).encode())


def test_equal_beginnings_have_one_key() -> None:
    long = "a system prompt " * 100
    assert key(prompt=long + "x") == key(prompt=long + "y", max_tokens=9) is not None
    assert key(prompt="x" + long) != key(prompt=long)
    system = {"role": "system", "content": long}
    first, second = ([system, {"role": "user", "content": word}] for word in ("one", "another"))
    assert key(messages=first) == key(messages=second)
    assert key(messages=[{"role": "user", "content": "one"}]) != key(messages=[{"role": "user", "content": "another"}])
    assert key(prompt=list(range(2 * BEGINNING))) == key(prompt=list(range(3 * BEGINNING)))
    assert key(prompt=["one", "two"]) == key(prompt="one")


NO_REQUESTS = [b"", b"{", b"[]", b"7", b"{}", b'{"prompt": ""}', b'{"prompt": 5}', b"\xff", b'{"prompt": [[]]}']


@pytest.mark.parametrize("body", NO_REQUESTS)
def test_what_is_no_request_has_none_or_any(body: bytes) -> None:
    assert key_of(body) is None or isinstance(key_of(body), str)


def test_replicas_share_the_keys_and_few_move() -> None:
    names = [f"replica-{i}" for i in range(4)]
    keys = [str(i) for i in range(4000)]
    before = {one: ranked(one, dict.fromkeys(names, 0))[0] for one in keys}
    assert all(900 < count < 1100 for count in Counter(before.values()).values())
    after = {one: ranked(one, dict.fromkeys([*names, "new"], 0))[0] for one in keys}
    moved = [one for one in keys if before[one] != after[one]]
    assert {after[one] for one in moved} == {"new"}
    assert 700 < len(moved) < 900
    gone = {one: ranked(one, dict.fromkeys(names[1:], 0))[0] for one in keys}
    assert all(gone[one] == before[one] for one in keys if before[one] != names[0])


def test_a_replica_with_too_much_is_spared() -> None:
    first, second = ranked("key", {"a": 0, "b": 0})
    assert ranked("key", {first: SLACK - 1, second: 0}) == [first, second]
    assert ranked("key", {first: SLACK, second: 0}) == [second, first]
    assert ranked("key", {first: SLACK + 5, second: 6}) == [first, second]
    assert ranked("key", {first: 4, second: 3}, places=4) == [second, first], "there is a place for it"
    assert ranked("key", {first: 3, second: 0}, places=4) == [first, second]
    assert ranked("key", {first: 6, second: 4}, places=4) == [first, second], "it would wait in either"
    assert ranked(None, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    assert ranked("key", {}) == []


def test_figures_of_several_as_one() -> None:
    one = '# HELP a what\n# TYPE a counter\na 1.0\n# TYPE b histogram\nb_bucket{le="1"} 2.0\nb_sum 3.0\n'
    told = with_label({"x": one, "y": one}).splitlines()
    assert told.count("# TYPE a counter") == told.count("# TYPE b histogram") == 1
    assert told.index("# TYPE b histogram") > told.index('a{replica="y"} 1.0')
    assert 'b_bucket{replica="x",le="1"} 2.0' in told
    assert 'b_sum{replica="y"} 3.0' in told
