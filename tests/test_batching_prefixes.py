"""Prefixes that leave one engine and come into another: what is hit there is what would have been computed there."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from engine_runs import CODED, EXACT, NEW, check_that_nothing_is_lost, engine, greedy, prompts, results
from torch import Tensor

from hf_pqcache.batching import enable_batching, prefix_file, support
from hf_pqcache.cache import sequence_file

pytestmark = [pytest.mark.cache, pytest.mark.usefixtures("one_thread")]
if why := support.why_unsupported():
    pytest.skip(why, allow_module_level=True)

LONG, OTHER, LIKE = list(prompts()[11]), list(prompts()[10]), [*prompts()[11][:70], *range(3, 40)]


@contextmanager
def managed(model: Any = None, **changes: Any) -> Iterator[Any]:
    """A running manager over a model of its own, as in another process."""
    own = {name: changes.pop(name) for name in list(changes) if name in (*CODED, "exact", "bits", "sink_tokens", "press")}
    base = (EXACT if own.get("exact") else CODED) | own
    model = enable_batching(copy.deepcopy(tiny_models.build("llama") if model is None else model), **base)
    config = engine(**{"allow_block_sharing": True, "max_requests_per_batch": 2, **changes})
    with model.continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        yield manager


def ask(manager: Any, *asked: list[int], new: int = NEW) -> list[list[int]]:
    names = [manager.add_request(prompt, max_new_tokens=new) for prompt in asked]
    found = results(manager, set(names))
    assert [found[name].error for name in names] == [None] * len(names)
    return [list(found[name].generated_tokens) for name in names]


def hits(manager: Any, prompt: list[int]) -> tuple[int, list[int]]:
    """Tokens of a prompt that were there already, and the answer."""
    before = manager.stats()["prefix_tokens"]
    (answer,) = ask(manager, prompt)
    return manager.stats()["prefix_tokens"] - before, answer


@pytest.mark.parametrize("kind", [{}, {"exact": True}, {"bits": 2, "sink_tokens": 0}])
def test_a_prefix_from_elsewhere_is_one_of_its_own(kind: dict[str, Any]) -> None:
    with managed(**kind) as there, managed(**kind) as here:
        (said,) = ask(there, LONG)
        follow_up = [*LONG, *said, 5, 6, 7]
        data = there.export_prefixes([[*LONG, *said]])
        taken = here.import_prefixes(data)
        assert taken.imported >= 6
        assert here.stats()["prefixes"]["imported"] == taken.imported == there.stats()["prefixes"]["exported"]
        assert here.export_prefixes([[*LONG, *said]]) == data
        own = hits(there, follow_up)
        assert own == hits(here, follow_up)
        assert own[0] >= 6 * 16
        check_that_nothing_is_lost(here)
        assert here.import_prefixes(data) == (0, taken.imported, 0)


def test_while_others_are_answered() -> None:
    """Many imports and exports between the steps of running requests change none of them."""
    with managed() as there, managed(max_requests_per_batch=4) as here:
        ask(there, LONG, LIKE)
        data = there.export_prefixes([LONG, LIKE])
        right = ask(there, OTHER, OTHER[::-1], OTHER[:30])
        here.import_prefixes(data)
        over, errors = threading.Event(), []

        def exchange() -> None:
            try:
                while not over.is_set():
                    here.import_prefixes(data)
                    here.export_prefixes([LONG, OTHER])
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=exchange)
        thread.start()
        try:
            assert ask(here, OTHER, OTHER[::-1], OTHER[:30]) == right
        finally:
            over.set()
            thread.join()
        assert not errors
        check_that_nothing_is_lost(here)


def test_before_it_runs_and_after_a_restart() -> None:
    with managed() as there:
        ask(there, LONG)
        data, wanted = there.export_prefixes([LONG]), hits(there, LONG)
    model = enable_batching(copy.deepcopy(tiny_models.build("llama")), **CODED)
    manager = model.init_continuous_batching(greedy(), engine(allow_block_sharing=True))
    with pytest.raises(RuntimeError, match="warmup"):
        manager.import_prefixes(data)
    manager.warmup()
    assert manager.import_prefixes(data).imported == 7
    manager.start()
    assert hits(manager, LONG) == wanted
    manager.stop()
    manager.destroy()


def test_what_most_prompts_begin_with_comes_first() -> None:
    with managed() as there, managed(num_blocks=10) as here, managed() as third:
        ask(there, LONG, LIKE, OTHER)
        block = there.stats()["blocks"]["bytes"]
        assert third.import_prefixes(there.export_prefixes([OTHER, LONG, LIKE], most_bytes=6 * block)).imported == 4
        assert hits(third, LIKE)[0] == 4 + 4 * 16  # which two begin with
        taken = here.import_prefixes(there.export_prefixes([OTHER, LONG, LIKE]))
        assert taken == (5, 0, taken.left_out)  # half of what is free
        assert taken.left_out > 3
        assert here.stats()["prefixes"]["left_out"] == taken.left_out
        assert hits(here, LIKE)[0] == 4 + 4 * 16
        assert there.export_prefixes([LONG], most_bytes=block // 2) == there.export_prefixes([[1, 2, 3]])


def loud(factor: float) -> Any:
    """A model with one key channel louder than the others."""
    model = copy.deepcopy(tiny_models.build("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3] *= factor
            layer.self_attn.k_proj.weight[11] *= factor
    return model


def test_an_equaliser_comes_along_or_is_refused() -> None:
    model = loud(20.0)
    with managed(model) as there, managed(model) as here, managed(model) as third:
        ask(there, LONG)
        cache = there.batch_processor.cache
        assert not torch.equal(cache.layers.equalisers, torch.ones_like(cache.layers.equalisers))
        here.import_prefixes(there.export_prefixes([]))  # what all later codes are made with
        ask(here, OTHER)
        assert torch.equal(here.batch_processor.cache.layers.equalisers, cache.layers.equalisers)
        assert here.import_prefixes(there.export_prefixes([LONG])).imported == 7
        assert hits(here, LONG) == hits(there, LONG)
        ask(third, OTHER)
        own = third.batch_processor.cache.layers.views[0].key_codec.equaliser
        own[0, 3] *= 2**0.5
        refused(third, there.export_prefixes([LONG]), "another equaliser")


def refused(manager: Any, data: Any, match: str, error: type[Exception] = ValueError) -> None:
    """The error is one line, and the engine is as before."""
    before = manager.stats()
    with pytest.raises(error, match=match) as raised:
        manager.import_prefixes(data)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    after = manager.stats()
    assert after["prefixes"]["refused"] == before["prefixes"]["refused"] + (error is ValueError)
    for name in ("blocks", "slots"):
        assert after[name] == before[name]


@pytest.fixture(scope="module")
def talk() -> bytes:
    with managed() as manager:
        ask(manager, LONG, OTHER, new=2)
        return bytes(manager.export_prefixes([LONG, OTHER]))


@pytest.fixture(scope="module")
def fresh() -> Iterator[Any]:
    with managed() as manager:
        yield manager


def test_cut_short_and_damaged(talk: bytes, fresh: Any) -> None:
    size = int.from_bytes(talk[:8], "little")
    for end in (0, 7, 100, 8 + size, len(talk) // 2, len(talk) - 1):
        refused(fresh, talk[:end], "cut short|damaged|digest")
    for at in range(0, len(talk), len(talk) // 30):
        broken = bytearray(talk)
        broken[at] ^= 1 << at % 8
        refused(fresh, bytes(broken), "data")
    refused(fresh, "prefixes.safetensors", "read_bytes", TypeError)
    refused(fresh, pickle.dumps({"a": 1}), "no exported prefixes")
    refused(fresh, sequence_file.pack({}, {}), "expected the format 'hf-pqcache-prefixes'")


def changed(data: bytes, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> bytes:
    """With a digest that says nothing is wrong."""
    description, parts = sequence_file.unpack(data, prefix_file.PREFIXES)
    change(description, parts)
    for name in ("format", "schema_version"):
        description.pop(name, None)
    return sequence_file.pack(description, parts, prefix_file.PREFIXES)


LIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "other codes": (lambda d, t: d.update(codec={"codes": [[8, 4], [8, 4]], "codebook": "0" * 64}), "codebook"),
    "no codec": (lambda d, t: d.pop("codec"), "this version"),
    "no config": (lambda d, t: d.update(config=None), "this version"),
    "another model": (lambda d, t: d["config"].update(num_hidden_layers=7), "another model"),
    "other weights": (lambda d, t: d.update(weights=["weights:" + "0" * 32, "float32"]), "other weights"),
    "settings": (lambda d, t: d["settings"].update(page_size=32), "page_size"),
    "a dtype": (lambda d, t: d.update(dtype="float16"), "float16"),
    "exact": (lambda d, t: d.update(cache="batching engine with exact blocks"), "exact blocks"),
    "fewer parents": (lambda d, t: t.update(parents=t["parents"][1:]), "parents"),
    "a parent to come": (lambda d, t: t["parents"][1].fill_(5), "stand behind"),
    "a parent that is none": (lambda d, t: t["parents"][1].fill_(-2), "stand behind"),
    "a first block too many": (lambda d, t: t["parents"][1].fill_(-1), "stand behind"),
    "tokens that the model has not": (lambda d, t: t["tokens"][0, 0].fill_(1 << 20), "tokens from"),
    "tokens below none": (lambda d, t: t["sink_tokens"][0, 0].fill_(-1), "tokens from"),
    "tokens of another kind": (lambda d, t: t.update(tokens=t["tokens"].long()), "int64"),
    "a flat list": (lambda d, t: t.update(tokens=t["tokens"].flatten()), "tokens are"),
    "no tokens": (lambda d, t: t.pop("tokens"), "have the tensors"),
    "one number": (lambda d, t: t.update(sink_tokens=torch.tensor(3, dtype=torch.int32)), "sink"),
    "larger blocks": (lambda d, t: t.update(blocks=t["blocks"].repeat(1, 2)), "blocks are"),
    "infinite codes": (lambda d, t: t["blocks"].fill_(0x7C), "finite"),
    "infinite sinks": (lambda d, t: t["sinks"].fill_(float("inf")), "finite"),
    "no sinks": (lambda d, t: t.update(sinks=t["sinks"][:0]), "sinks|stand behind"),
    "no equaliser": (lambda d, t: t.pop("equaliser"), "no equaliser"),
    "an equaliser of zeros": (lambda d, t: t["equaliser"].zero_(), "positive"),
    "an equaliser of one layer": (lambda d, t: t.update(equaliser=t["equaliser"][:1]), "equaliser"),
    "a tensor too many": (lambda d, t: t.update(more=torch.zeros(1)), "more"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, talk: bytes, fresh: Any) -> None:
    change, match = LIES[lie]
    refused(fresh, changed(talk, change), match)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"exact": True}, "coded blocks"),
        ({"bits": 2}, "bits and codebook"),
        ({"page_size": 32}, "page_size=16"),
        ({"sink_tokens": 0}, "sink_tokens=4"),
        ({"extended_residual": 32}, "extended_residual"),
    ],
)
def test_of_another_engine(other: dict[str, Any], match: str, talk: bytes) -> None:
    with managed(**other) as manager:
        refused(manager, talk, match)


def test_of_another_model(talk: bytes) -> None:
    with managed(loud(2.0)) as manager:
        refused(manager, talk, "other weights")
    with managed(copy.deepcopy(tiny_models.build("llama")).half()) as manager:
        refused(manager, talk, "float32")


def test_what_are_no_prompts(fresh: Any) -> None:
    for none in ([1, 2, 3], ["text"], [[0.5]], [None]):
        with pytest.raises(TypeError):
            fresh.export_prefixes(none)
    tensors = fresh.export_prefixes([torch.tensor(LONG)])
    assert tensors == fresh.export_prefixes([LONG])


def test_engines_that_share_nothing(talk: bytes) -> None:
    with managed(allow_block_sharing=False) as manager, pytest.raises(ValueError, match="allow_block_sharing"):
        manager.export_prefixes([LONG])
    with managed(press="snapkv:0.5") as manager, pytest.raises(ValueError, match="press"):
        manager.import_prefixes(talk)


def test_images_stay_at_home() -> None:
    """Their token ids are given in the order in which they came, in each process anew."""
    with managed() as manager:
        ask(manager, LONG, new=2)
        most = prefix_file.known_tokens(manager.model)
        with_image = [*LONG[:60], most + 3, *LONG[60:]]
        _, tensors = sequence_file.unpack(manager.export_prefixes([with_image]), prefix_file.PREFIXES)
        assert len(tensors["tokens"]) == 3
