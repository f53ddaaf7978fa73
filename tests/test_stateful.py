"""Random histories of both caches, compared after each step with plain lists: what they hold, and who owns which page.

The model of a row is a list of token numbers for each layer, and a list of pages. Token number i stands for one fixed
vector, so what a cache must return is an index into two tables: the vectors, and what codes make of them.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from transformers import LlamaConfig

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.pages import offload
from hf_pqcache.pages.block_pool import PageAllocator
from hf_pqcache.pages.codec import CodedPages, ExactPages
from hf_pqcache.storage.lengths import Lengths
from hf_pqcache.storage.storage import Storage

LAYERS, HEAD_DIM, PAGE, MAX_PAGES, TOKENS = 2, 8, 16, 14, 512
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=HEAD_DIM, vocab_size=8
)


@dataclass(frozen=True)
class RoundedPages(ExactPages):
    """Stands in for pages of codes: what it makes of a token depends on no other, so that any mix of rows can be foretold."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.round())

    @classmethod
    def standing_in(cls, x: Tensor, which: str, page_size: int, book: object) -> RoundedPages:
        return cls.like(x, page_size)


@pytest.fixture(autouse=True)
def simple_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodedPages, "like", RoundedPages.standing_in)


@dataclass(frozen=True)
class Kind:
    """One of the two caches: how to make it, the size of its window, and what a page makes of each token."""

    make: Callable[[], Any]
    sinks: int
    recent: int
    exact: Tensor  # (layers, 2, TOKENS, d)
    paged: Tensor

    def pages(self, length: int) -> int:
        return max(0, length - self.sinks - self.recent) // PAGE


VECTORS = 4 * torch.randn(LAYERS, 2, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
POOL = {"page_size": PAGE, "max_pages": MAX_PAGES}
RECENT = {"sink_tokens": 2, "extended_residual": 5}
CODED = Kind(lambda: PagedPQCache(CONFIG, num_subspaces=8, **POOL, **RECENT), 2, 5, VECTORS, VECTORS.round())
OFFLOADED = Kind(lambda: PagedPQCache(CONFIG, num_subspaces=8, **POOL, **RECENT, offload=True), 2, 5, VECTORS, VECTORS.round())
EXACT = Kind(lambda: PagedKVCache(CONFIG, **POOL), 0, 1, VECTORS, VECTORS)


@dataclass
class Row:
    """What one sequence must hold: token numbers of each layer, and pages, which are any objects."""

    tokens: list[list[int]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])
    lost: list[int] = field(default_factory=lambda: [0] * LAYERS)  # before this token the exact vectors are gone
    pages: list[object] = field(default_factory=list)
    start: int = 0

    def fork(self, kind: Kind) -> Row:
        written = max(kind.pages(len(tokens)) for tokens in self.tokens)
        return Row([list(t) for t in self.tokens], list(self.lost), self.pages[:written], self.start)

    def append(self, kind: Kind, layer: int, new: list[int]) -> None:
        self.tokens[layer] += new
        length = len(self.tokens[layer])
        self.lost[layer] = max(self.lost[layer], length - kind.recent - PAGE)
        self.own(kind.pages(length))

    def needed(self, kind: Kind, layer: int, count: int, rows: list[Row]) -> list[int]:
        """Places of the pages that are written when `count` tokens come, and not this row's alone yet."""
        length = len(self.tokens[layer])
        owners = Counter(id(page) for row in rows for page in row.pages)
        places = range(kind.pages(length), kind.pages(length + count))
        return [i for i in places if i >= len(self.pages) or owners[id(self.pages[i])] > 1]

    def own(self, count: int) -> None:
        self.pages += [object() for _ in range(count - len(self.pages))]

    def crop(self, kind: Kind, length: int) -> None:
        for layer, tokens in enumerate(self.tokens):
            del tokens[length:]
            self.lost[layer] = min(self.lost[layer], len(tokens))
        del self.pages[max(kind.pages(len(tokens)) for tokens in self.tokens) :]

    def expected(self, kind: Kind, layer: int) -> Tensor:
        """(2, n, d): keys and values that the cache must return."""
        tokens = self.tokens[layer]
        in_pages = kind.sinks + PAGE * kind.pages(len(tokens))
        border = max(in_pages, self.lost[layer])
        parts = (tokens[: kind.sinks], kind.exact), (tokens[kind.sinks : border], kind.paged), (tokens[border:], kind.exact)
        return torch.cat([table[layer][:, ids] for ids, table in parts if ids or table is kind.exact], dim=1)


class CacheMachine(RuleBasedStateMachine):
    """What both ways of using a cache have in common."""

    kind: Kind
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.kind.make()
        self.next_token = 0

    def new_tokens(self, count: int) -> list[int]:
        first = self.next_token
        self.next_token += count
        return [i % TOKENS for i in range(first, first + count)]

    def rows(self) -> list[Row]:
        raise NotImplementedError

    def num_used(self, rows: list[Row] | None = None) -> int:
        return len({id(page) for row in (self.rows() if rows is None else rows) for page in row.pages})

    def attempt(self, needed: int, action: Callable[[], Any]) -> bool:
        """Do it; True if there were pages. `needed` more pages must be refused exactly if they are not there."""
        if self.num_used() + needed > MAX_PAGES:
            with pytest.raises(PagesExhaustedError, match="PQC001"):
                action()
            return False
        action()
        return True

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        CacheMachine.steps += 1
        allocator, table = self.cache.storage.layers.allocator, self.cache.storage.layers.table
        owners = Counter(page for row in table.rows for page in row)
        assert all(allocator.references(page) == count for page, count in owners.items())
        reserved = allocator.num_reserved
        free = allocator.allocate(reserved - allocator.num_used)
        assert not Counter(free) - Counter(set(free)), "a page is free twice"
        assert not set(free) & set(owners)
        assert allocator.num_reserved == reserved, "a page is lost"
        allocator.release(free)
        assert table.num_free == MAX_PAGES - len(owners)
        assert allocator.num_used == table.num_used == self.num_used()


class Sequences(CacheMachine):
    """The sequence-level API."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, Row] = {}
        self.next_id = 0

    def rows(self) -> list[Row]:
        return list(self.model.values())

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(list(self.model)))

    @precondition(lambda self: len(self.model) < 5)
    @rule(initial_len=st.sampled_from([0, 0, 0, 20, 60, 1000]))
    def allocate(self, initial_len: int) -> None:
        self.next_id += 1
        pages = self.kind.pages(initial_len)
        if self.attempt(pages, lambda: self.cache.allocate_sequence(self.next_id, initial_len)):
            self.model[self.next_id] = Row()
            self.model[self.next_id].own(pages)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 40), layers=st.sampled_from([(0, 1), (0, 1), (1, 0), (0,), (1,)]))
    def append(self, data: st.DataObject, count: int, layers: tuple[int, ...]) -> None:
        name, new = self.pick(data), self.new_tokens(count)
        row = self.model[name]
        for layer in layers:
            needed = row.needed(self.kind, layer, count, self.rows())
            k, v = self.kind.exact[layer][:, new][:, None]
            if self.attempt(len(needed), lambda k=k, v=v, layer=layer: self.cache.append_tokens(name, layer, k, v)):
                row.pages = [object() if i in needed else page for i, page in enumerate(row.pages)]
                row.append(self.kind, layer, new)
        self.compare(name)

    @precondition(lambda self: 0 < len(self.model) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name, self.next_id = self.pick(data), self.next_id + 1
        self.cache.fork_sequence(name, self.next_id)
        self.model[self.next_id] = self.model[name].fork(self.kind)
        self.compare(self.next_id)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        name = self.pick(data)
        length = data.draw(st.integers(0, max(map(len, self.model[name].tokens))))
        self.cache.crop_sequence(name, length)
        self.model[name].crop(self.kind, length)
        self.compare(name)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.cache.free_sequence(name)
        del self.model[name]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        name, k = self.pick(data), torch.zeros(1, 3, HEAD_DIM)
        with pytest.raises(ValueError, match="already"):
            self.cache.allocate_sequence(name)
        with pytest.raises(KeyError, match="no sequence"):
            self.cache.free_sequence("nobody")
        with pytest.raises(ValueError, match="k, v: expected"):
            self.cache.append_tokens(name, 0, k, k[:, :2])
        with pytest.raises(ValueError, match="reset"):
            self.cache.update(k[None], k[None], 0) if self.cache.storage.layers.views else self.cache.crop(-1)
        self.compare(name)

    @rule(really=st.sampled_from([False] * 7 + [True]))
    def reset(self, really: bool) -> None:
        if really:
            self.cache.reset()
            self.model.clear()

    @rule(really=st.sampled_from([False] * 3 + [True]))
    def copy(self, really: bool) -> None:
        if really:
            self.cache = copy.deepcopy(self.cache)

    def compare(self, name: int) -> None:
        for layer, tokens in enumerate(self.model[name].tokens):
            if layer in self.cache.storage.layers.views:
                got = torch.cat(self.cache.get_kv(name, layer))
                torch.testing.assert_close(got, self.model[name].expected(self.kind, layer), rtol=0, atol=0)
            else:
                assert not tokens

    def teardown(self) -> None:
        for name in list(self.model):
            self.compare(name)
            self.cache.free_sequence(name)
        self.model.clear()
        self.every_page_is_accounted_for()
        assert self.cache.storage.layers.table.num_free == MAX_PAGES


class Batch(CacheMachine):
    """What `generate` does: rows that advance together, reordered, repeated, selected and cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.model: list[Row] = []
        self.total = 0

    def rows(self) -> list[Row]:
        return self.model

    @initialize(batch=st.integers(1, 3))
    def begin(self, batch: int) -> None:
        self.model = [Row() for _ in range(batch)]

    def step(self, new: list[list[int]], padding: list[int], layers: range) -> None:
        """One forward pass, as far as `layers` go."""
        count, total = len(new[0]), self.total
        mask = torch.ones(len(new), 1, 1, total + count, dtype=torch.bool)
        for row, pad in enumerate(padding):
            mask[row, ..., : self.model[row].start if total else pad] = False
        positions = mask[:, 0, 0, total:].cumsum(-1) - 1  # as generate counts
        assert self.cache.get_seq_length() == total
        self.cache.get_mask_sizes(count, 0)
        for layer in layers:
            k, v = self.kind.exact[layer][:, new][:, :, None]
            self.cache.update(k, v, layer)
            self.cache.layers[layer].commit(mask, positions)

    @rule(data=st.data(), count=st.one_of(st.just(1), st.integers(1, 40)), is_broken=st.sampled_from([False, False, True]))
    def forward(self, data: st.DataObject, count: int, is_broken: bool) -> None:
        new = [self.new_tokens(count) for _ in self.model]
        padding = [0] * len(new)
        if not self.total:
            padding = [data.draw(st.integers(0, count - 1)) for _ in new]
        lengths = [
            self.total + count - (row.start if self.total else pad) for row, pad in zip(self.model, padding, strict=True)
        ]
        needed = sum(max(0, self.kind.pages(n) - len(row.pages)) for n, row in zip(lengths, self.model, strict=True))
        layers = range(1 if is_broken and self.cache.storage.layers.views else LAYERS)
        if not self.attempt(needed, lambda: self.step(new, padding, layers)):
            return
        for row, ids, pad in zip(self.model, new, padding, strict=True):
            row.start = row.start if self.total else pad
            for layer in layers:
                row.append(self.kind, layer, ids[pad:])
        if len(layers) == LAYERS:
            self.total += count
        else:
            self.cache.crop(0)
            for row in self.model:
                row.crop(self.kind, max(0, self.total - row.start))
                row.start = min(row.start, self.total)
        self.compare()

    @precondition(lambda self: self.total)
    @rule(data=st.data(), how=st.sampled_from(["reorder", "select", "repeat"]))
    def rearrange(self, data: st.DataObject, how: str) -> None:
        rows = range(len(self.model))
        if how == "repeat":
            indices = [i for i in rows for _ in range(2)]
            if len(indices) > 6:
                return
            self.cache.batch_repeat_interleave(2)
        else:
            size = len(self.model) if how == "reorder" else data.draw(st.integers(1, len(self.model)))
            indices = data.draw(st.lists(st.sampled_from(rows), min_size=size, max_size=size))
            {"reorder": self.cache.reorder_cache, "select": self.cache.batch_select_indices}[how](torch.tensor(indices))
        self.model = [self.model[i].fork(self.kind) for i in indices]
        self.compare()

    @precondition(lambda self: self.total)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, min(self.total, 60)))
        self.cache.crop(-count)
        self.total -= count
        for row in self.model:
            row.crop(self.kind, max(0, self.total - row.start))
            row.start = min(row.start, self.total)
        self.compare()

    @rule(really=st.sampled_from([False] * 7 + [True]), batch=st.integers(1, 4))
    def reset(self, really: bool, batch: int) -> None:
        if really:
            self.cache.reset()
            self.total, self.model = 0, [Row() for _ in range(batch)]

    @rule(really=st.sampled_from([False] * 3 + [True]))
    def copy(self, really: bool) -> None:
        if really:
            self.cache = copy.deepcopy(self.cache)

    def compare(self) -> None:
        for layer in self.cache.storage.layers.views if self.total else ():
            got = torch.stack([self.cache.layers[layer].keys, self.cache.layers[layer].values])[:, :, 0]
            assert got.shape[2] == self.total
            for i, row in enumerate(self.model):
                torch.testing.assert_close(got[:, i, row.start :], row.expected(self.kind, layer), rtol=0, atol=0)
                assert not got[:, i, : row.start].any()

    def teardown(self) -> None:
        self.cache.reset()
        assert self.cache.storage.layers.table.num_free == MAX_PAGES


MACHINES = {
    f"{base.__name__}-{name}": type(f"{base.__name__}{name}", (base,), {"kind": kind})
    for base in (Sequences, Batch)
    for name, kind in (("codes", CODED), ("exact", EXACT), ("offloaded", OFFLOADED))
}
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(autouse=True)
def one_staging_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one for two layers, offloaded pages must come and go all the time."""
    monkeypatch.setattr(offload, "NUM_STAGING", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_random_histories_equal_plain_lists(name: str) -> None:
    before = CacheMachine.steps
    run_state_machine_as_test(
        MACHINES[name],
        # Shrinking a history of a hundred steps takes minutes; the seed that pytest prints repeats it as it was.
        settings=settings(max_examples=40, stateful_step_count=100, phases=[Phase.generate], **QUICK),
    )
    assert CacheMachine.steps - before >= 2500, "six machines are to make 15,000 steps at least"


# -- a test of the tests: each of these mistakes, planted, must be found ------------------------------------------------
def _free_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page goes back to the free list while another sequence still refers to it, and again when that one goes."""
    release = PageAllocator.release

    def release_for_all(self: PageAllocator, pages: Any) -> None:
        for page in pages:
            release(self, [page] * self.references(page))

    monkeypatch.setattr(PageAllocator, "release", release_for_all)


def _lose_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing counts one reference too many, so the page never comes back."""
    share = PageAllocator.share

    def share_once_more(self: PageAllocator, pages: Any) -> None:
        pages = list(pages)
        share(self, pages)
        share(self, pages[:1])

    monkeypatch.setattr(PageAllocator, "share", share_once_more)


def _crop_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crop keeps one token too many."""
    crop, crop_sequence = Storage.crop, Storage.crop_sequence
    monkeypatch.setattr(Storage, "crop", lambda self, tokens: crop(self, tokens + 1))
    monkeypatch.setattr(Storage, "crop_sequence", lambda self, seq, length: crop_sequence(self, seq, length + 1))


def _restore_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crop forgets to restore the last token that has lost its window slot."""
    count = Lengths.count

    def count_one_less(self: Lengths, layer: int, positions: list[int]) -> None:
        count(self, layer, positions)
        self.reused[layer] = [max(0, reused - 1) for reused in self.reused[layer]]

    monkeypatch.setattr(Lengths, "count", count_one_less)


def _share_what_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that lags behind writes a page that a copy of its row shares."""

    monkeypatch.setattr(PageAllocator, "references", lambda self, page: 1)


def _forget_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written pages are not copied to the host."""
    monkeypatch.setattr(offload.HostedStore, "write_back", lambda self, pages: None)


def _bring_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that takes over the staging pool finds the pages of the layer before."""
    monkeypatch.setattr(offload.StagingGroup, "load", lambda self, place: setattr(self.staging[0], "owner", place))


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "a page freed twice": (_free_twice, tuple(MACHINES)),
    "a page lost": (_lose_a_page, tuple(MACHINES)),
    "crop off by one": (_crop_off_by_one, tuple(MACHINES)),
    "restoring off by one": (_restore_off_by_one, ("Sequences-codes", "Batch-codes")),
    "no copy on the host": (_forget_a_copy, ("Sequences-offloaded", "Batch-offloaded")),
    "pages of another layer": (_bring_nothing_new, ("Sequences-offloaded", "Batch-offloaded")),
    "no copy on write": (_share_what_is_written_to, ("Sequences-codes", "Sequences-exact")),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("bug", "name"), [(bug, name) for bug, (_, names) in PLANTED.items() for name in names])
def test_a_planted_bug_is_found(bug: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug][0](monkeypatch)
    with pytest.raises((AssertionError, ValueError, LookupError)):
        run_state_machine_as_test(
            MACHINES[name],
            settings=settings(
                max_examples=60, stateful_step_count=100, phases=[Phase.generate], print_blob=False, derandomize=True, **QUICK
            ),
        )
    gc.collect()  # broken caches fail here once more, and not in the middle of what comes next
