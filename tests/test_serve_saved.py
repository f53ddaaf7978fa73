"""What a server has stored of its last texts: which those are, and that the next server begins with them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import pqcache
from served import GREEDY, PROMPTS, SETTINGS, Served, served

from hf_pqcache.batching import support
from hf_pqcache.serve.prefix import ranked
from hf_pqcache.serve.recent import Recent

pytestmark = pytest.mark.usefixtures("one_thread")
if why := support.why_unsupported():
    pytest.skip(why, allow_module_level=True)


def test_texts_that_go_on_are_one_and_old_ones_are_forgotten() -> None:
    recent = Recent(20)
    recent.note("a", [1, 2, 3])
    recent.note("b", [4, 5])
    recent.note("a", [1, 2, 3, 4])
    recent.note("a", [1, 9])
    assert [(key, ids.tolist()) for key, ids in recent.texts()] == [("a", [1, 9]), ("a", [1, 2, 3, 4]), ("b", [4, 5])]
    assert [text.key for text in recent.texts({"b"})] == ["b"]
    recent.note("c", range(14))
    assert [text.key for text in recent.texts()] == ["c", "a", "a"]
    recent.note("d", range(21))
    assert recent.texts() == []
    assert recent.tokens == 0


def test_texts_are_never_more_than_there_is_room_for() -> None:
    rng, recent = random.Random(0), Recent(100)
    for _ in range(500):
        key, length = rng.choice("abc"), rng.randint(1, 30)
        recent.note(key, [rng.randint(0, 1) for _ in range(length)])
        assert recent.tokens == sum(len(text.ids) for text in recent.texts()) <= 100


def test_heirs_are_those_whom_the_router_asks() -> None:
    recent, others = Recent(1000), ["one", "two", "three"]
    for number in range(30):
        recent.note(str(number), [number])
    found = recent.by_heir(others)
    assert {name: {text.key for text in texts} for name, texts in found.items()} == {
        name: {key for key in map(str, range(30)) if ranked(key, dict.fromkeys(others, 0))[0] == name} for name in others
    }
    assert recent.by_heir([]) == {}


def asked(server: Served, prompt: str) -> tuple[float, str]:
    """Tokens that were there already, and the answer."""
    name = "pqcache_prefix_hit_tokens_total"
    before = server.metric(name)
    (text,) = server.texts(prompt=prompt, **GREEDY)
    return server.metric(name) - before, text


def test_a_server_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    file = tmp_path / "tiny.prefixes"
    with served(prefixes=file) as server:
        (said,) = server.texts(prompt=PROMPTS[2], **GREEDY)
        (right,) = server.texts(prompt=PROMPTS[2] + said, **GREEDY)
    with served(prefixes=file) as server:
        engine = server.service.engine
        assert engine is not None
        assert engine.export_prefixes(engine.recent.texts()) == file.read_bytes()  # though nobody has asked
        hits, text = asked(server, PROMPTS[2] + said)
        assert text == right
        assert server.metric("pqcache_prefix_imported_tokens_total") >= hits - 4 > 100
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert os.name != "posix" or file.stat().st_mode & 0o077 == 0


def test_a_file_of_something_else_is_refused_and_left(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("what somebody wrote")
    with pytest.raises(ValueError, match=r"notes\.txt.*no exported prefixes.*another file"), served(prefixes=file):
        pass
    assert file.read_text() == "what somebody wrote"
    result: Any = pqcache("serve", "tiny", "--port", 0, "--prefixes", file, "--cache-tokens", SETTINGS["cache_tokens"])
    assert result.exit_code == 1
    assert "notes.txt" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--bits", "stock"), "stock"),
        (("--no-prefix-sharing",), "no-prefix-sharing"),
        (("--press", "knorm:0.5"), "press"),
        (("--replicas", 2), "replicas"),
    ],
)
def test_where_there_is_nothing_to_save(options: tuple[Any, ...], told: str) -> None:
    result = pqcache("serve", "tiny", "--prefixes", "file", *options)
    assert result.exit_code == 2
    assert told in result.output
