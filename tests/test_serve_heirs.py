"""Who gets which prefixes of a replica that ends, and that nothing keeps it from its end; without Ray."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from hf_pqcache.batching.prefixes import Taken
from hf_pqcache.serve import heirs
from hf_pqcache.serve.prefix import ranked
from hf_pqcache.serve.recent import Recent, Text


class Stored:
    """Stands for an engine: what leaves it are the texts themselves."""

    exchanges_prefixes, refuses = True, False

    def __init__(self, keys: str = "") -> None:
        self.recent, self.limits = Recent(1000), list[int | None]()
        self.got: list[Text] = []
        for number, key in enumerate(keys):
            self.recent.note(key, [number])

    def is_alive(self) -> bool:
        return True

    def export_prefixes(self, texts: list[Text], most_bytes: int | None) -> bytes:
        self.limits.append(most_bytes)
        return "".join(str(text.key) for text in texts).encode()

    def import_prefixes(self, data: bytes, texts: list[Text]) -> Taken:
        if self.refuses:
            raise ValueError("another equaliser")
        self.got += texts
        return Taken(len(texts), 0, 0)


class Handle:
    """Stands for Ray's: calls go to the replica that the router would take."""

    def __init__(self, engines: dict[str, Stored], seconds: float = 0.0) -> None:
        self.engines, self.seconds = engines, seconds
        self.inherit = SimpleNamespace(remote=self._inherit)

    def broadcast(self, method: str) -> Any:
        async def results_async(timeout_s: float) -> list[str]:
            if not self.engines:
                raise RuntimeError("no replicas")
            await asyncio.sleep(self.seconds)
            return [*self.engines, "own"]

        return SimpleNamespace(results_async=results_async)

    async def _inherit(self, data: bytes, texts: list[Text], key: str) -> dict[str, int]:
        first = ranked(key, dict.fromkeys(self.engines, 0))[0]
        return await heirs.inherit(self.engines[first], data, texts)  # type: ignore[arg-type]


def hand_over(engine: Any, handle: Handle, most_bytes: int = 100) -> None:
    asyncio.run(heirs.hand_over(engine, "own", handle, most_bytes))


def test_all_goes_to_whom_the_router_asks() -> None:
    ending, others = Stored("abcdefghijkl"), {"one": Stored(), "two": Stored(), "three": Stored()}
    hand_over(ending, Handle(others))
    assert ending.limits == [33, 33, 33]
    for name, engine in others.items():
        assert engine.got
        assert all(ranked(text.key, dict.fromkeys(others, 0))[0] == name for text in engine.got)
    assert sorted(str(text.key) for engine in others.values() for text in engine.got) == list("abcdefghijkl")


def test_nobody_else_or_nothing_to_give() -> None:
    hand_over(Stored("a"), Handle({}))
    for nothing in (Stored(), Stored("a")):
        nothing.exchanges_prefixes = len(nothing.recent.texts()) == 0
        hand_over(nothing, Handle({"one": (one := Stored())}))
        assert one.got == []
    hand_over(idle := Stored("a"), Handle({"one": Stored()}), most_bytes=0)
    assert idle.limits == []


def test_what_does_not_fit_or_lasts_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: Stored() for name in ("one", "two", "three")}
    others["two"].refuses = True
    hand_over(Stored("abcdefghijkl"), Handle(others))
    assert [bool(engine.got) for engine in others.values()] == [True, False, True]
    monkeypatch.setattr(heirs, "HAND_OVER_S", 0.1)
    begun = time.monotonic()
    hand_over(Stored("a"), Handle({"two": Stored()}, seconds=30))
    assert time.monotonic() - begun < 5
