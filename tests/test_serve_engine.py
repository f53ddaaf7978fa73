"""The engine of a server: its sizes are those asked for, and a transformers that lacks a part is refused by name."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from served import GREEDY, PROMPTS, answers_of_generate, served, tiny

from hf_pqcache.batching import streams
from hf_pqcache.cli.commands import _options, serve
from hf_pqcache.serve import manager
from hf_pqcache.serve.engine import Engine
from hf_pqcache.serve.manager import SIGNATURES, VARIANTS, EngineSettings

pytestmark = pytest.mark.usefixtures("one_thread")
MODULE = "transformers.generation.continuous_batching"


def test_commands_know_all_variants() -> None:
    assert _options.VARIANTS == VARIANTS
    assert _options.COMPRESS == streams.COMPRESS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("page_size", [None, 32])
def test_the_pool_has_room_for_the_tokens_asked_for(variant: str, page_size: int | None) -> None:
    """And not for much more: the exact window aside, less than a block of 256."""
    made = Engine(tiny()[0], EngineSettings(variant, cache_tokens=2000, page_size=page_size, max_batch_tokens=64))
    assert 2000 <= made.capacity <= 2000 + 256 + 200
    assert made.most_requests >= 16


def test_a_known_workload_is_the_longest_request() -> None:
    made = Engine(tiny()[0], EngineSettings("4", cache_tokens=2000, max_batch_tokens=64, context=700, longest_prompt=600))
    assert 700 <= made.capacity <= 700 + 256
    made = Engine(tiny()[0], EngineSettings("4", max_batch_tokens=64, max_requests=2, context=20_000, longest_prompt=19_000))
    assert made.capacity >= 20_000


def test_what_the_first_client_says_decides_nothing_for_others() -> None:
    """The equaliser of codes is there before anybody asks."""
    model, tokenizer = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[:2] *= 9
    made = Engine(model, EngineSettings("4", cache_tokens=1024, page_size=16, max_batch_tokens=128))
    made.start(tokenizer)
    found = made.cache.layers.equalisers
    made.stop()
    assert bool((found > 1).any())


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_part_that_transformers_lacks_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert manager.missing_parts() == []
    module, *owners, name = path.split(".")
    owner: Any = importlib.import_module(f"{MODULE}.{module}")
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, lambda self: None)
    assert {missing.split()[0] for missing in manager.missing_parts()} == {path}
    with pytest.raises(ImportError, match=path):
        manager.make_manager(tiny()[0], EngineSettings("stock"))


def test_a_press_and_what_cannot_be_had_are_served_and_said() -> None:
    press = "knorm:0.5"
    expected = answers_of_generate("4", press)
    assert expected != answers_of_generate("4")
    with served(press=press, compress="partition", page_size=16) as server:
        assert server.texts(prompt=list(PROMPTS), **GREEDY) == [server.decoded(ids) for ids in expected.values()]
        facts = 'blocks="4",compress="inline",compress_because="a device of type cpu has no streams",press="knorm:0.5"'
        assert f"pqcache_engine_info{{{facts}}} 1.0" in server.client.get("/metrics").text
        assert server.metric("pqcache_pruned_tokens_total") > 300
        ready = serve._ready(server.service, server.url)
    assert "4 bits, press knorm:0.5, prompts stored within steps (a device of type cpu has no streams)" in ready


@pytest.mark.parametrize("asked", [{"press": "knorm:0.5"}, {"compress": "stream"}])
def test_what_blocks_of_transformers_cannot_do_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))}= is for blocks of ours"):
        EngineSettings("stock", **asked)
