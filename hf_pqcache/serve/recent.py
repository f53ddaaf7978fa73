"""Which texts were asked for last, so that what an engine has stored of them can be saved or handed over; knows no engine."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from hf_pqcache.serve.prefix import ranked


class Text(NamedTuple):
    """Tokens of a prompt and its answer, and the key by which the router knows how it begins."""

    key: str | None
    ids: array[int]


class Recent:
    """The texts of the last requests.

    Args:
        most_tokens: of all texts together, such as an engine has room for; older ones are forgotten.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens, self.tokens = most_tokens, 0
        self._of: OrderedDict[str | None, list[array[int]]] = OrderedDict()  # oldest first, and so in each list

    def note(self, key: str | None, ids: Iterable[int]) -> None:
        """A text has come. Those of the same key that it goes on from are part of it."""
        new, runs = array("i", ids), self._of.setdefault(key, [])
        self._of.move_to_end(key)
        gone = [old for old in runs if new[: len(old)] == old]
        runs[:] = [old for old in runs if new[: len(old)] != old] + [new]
        self.tokens += len(new) - sum(map(len, gone))
        while self.tokens > self.most_tokens:
            oldest = next(iter(self._of))
            self.tokens -= len(self._of[oldest].pop(0))
            if not self._of[oldest]:
                del self._of[oldest]

    def texts(self, keys: Container[str | None] | None = None) -> list[Text]:
        """The texts of these keys, or all of them, newest first."""
        found = reversed(list(self._of.items()))
        return [Text(key, ids) for key, runs in found if keys is None or key in keys for ids in reversed(runs)]

    def by_heir(self, others: Iterable[str]) -> Mapping[str, list[Text]]:
        """Who of the other replicas gets the requests that go on from these texts, once this one is gone."""
        load = dict.fromkeys(others, 0)
        heir = {key: ranked(key, load)[0] for key in self._of} if load else {}
        return {name: self.texts({key for key in heir if heir[key] == name}) for name in {*heir.values()}}
