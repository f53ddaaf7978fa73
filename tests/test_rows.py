"""What becomes of a cache's rows: cropping back anywhere, and moving rows at the price of page tables."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import SMALL, build, codebook_of, padded, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")


class BytesWritten(TorchDispatchMode):
    """Counts the bytes that operators write into new or changed tensors, by the storage they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_storage: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        for value, what in zip(out if isinstance(out, (list, tuple)) else [out], returns, strict=False):
            is_view = what.alias_info is not None and not what.alias_info.is_write
            if isinstance(value, Tensor) and not is_view:
                self.total += value.nbytes
                pointer = value.untyped_storage().data_ptr()
                self.by_storage[pointer] = self.by_storage.get(pointer, 0) + value.nbytes
        return out


def filled(count: int, rows: int = 2) -> PagedPQCache:
    """A cache of a Llama's that holds `count` tokens in each row."""
    model = build("llama")
    cache = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    with torch.no_grad():
        model(tokens(rows, count), **cache_kwargs(cache))
    cache.stats()  # stores what waits
    return cache


def slabs_of(cache: PagedPQCache) -> list[Tensor]:
    """Keys and values of every slab of every layer."""
    slabs = [slab for view in cache.storage.layers.views.values() for slab in view.store.slabs.values()]
    return [side for slab in slabs for side in (slab.keys, slab.values)]


def slab_pointers(cache: PagedPQCache) -> set[int]:
    return {side.untyped_storage().data_ptr() for side in slabs_of(cache)}


MOVES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("move", MOVES)
def test_moving_rows_costs_page_tables_not_codes(move: str) -> None:
    """No byte is written into a pool, no page is taken, and many more tokens cost some more numbers in tables only."""
    written, used = [], []
    for count in (60, 380):
        cache = filled(count)
        before = cache.stats()["pages_used"]
        slabs = [slab.clone() for slab in slabs_of(cache)]
        with BytesWritten() as meter:
            MOVES[move](cache)
        assert not slab_pointers(cache) & set(meter.by_storage), "codes were written"
        assert move == "select" or all(torch.equal(a, b) for a, b in zip(slabs, slabs_of(cache), strict=True))
        written.append(meter.total)
        used.append((before, cache.stats()["pages_used"]))
    assert all(after <= before for before, after in used)
    more_codes = (used[1][0] - used[0][0]) * cache.storage.layers.page_bytes
    assert more_codes > 20_000
    assert abs(written[1] - written[0]) < more_codes / 10, "the cost of moving rows grows with their tokens"


def test_repeated_rows_share_pages_until_they_part() -> None:
    model, cache = build("llama"), filled(60, rows=1)
    pages = cache.stats()["pages_used"]
    cache.batch_repeat_interleave(4)
    assert cache.stats()["pages_used"] == pages
    with torch.no_grad():
        model(tokens(4, 17), **cache_kwargs(cache))
    assert cache.stats()["pages_used"] == pages + 4
    cache.batch_select_indices(torch.tensor([2]))
    assert cache.stats()["pages_used"] == pages + 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "indices", [[2, 0], (2, 0), [2, 2, 2, -3], (1,), [True, False, True], torch.tensor([False, True, True])]
)
def test_rows_are_selected_by_whatever_dynamic_cache_takes(name: str, indices: Any) -> None:
    model = build(name)
    cache, plain = PagedKVCache(model.config, page_size=16), DynamicCache(config=model.config)
    for each in (cache, plain):
        model(tokens(3, 40), **cache_kwargs(each))
        each.batch_select_indices(indices)
    rows = plain.layers[-1].keys.shape[0]
    assert cache.batch_size == rows
    step = tokens(rows, 1, seed=5)
    got, expected = (model(step, **cache_kwargs(each)).logits for each in (cache, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


#: Tokens removed one after the other from 90: within the window, over a page's border, over several, to the sinks and into
#: them, to nothing. After each, a step of one token and one of three.
CROPS = [[1], [3, 17], [30, 2], [45], [20, 20, 20], [84], [88], [90]]


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("crops", CROPS, ids=str)
def test_crop_anywhere(crops: list[int], is_padded: bool) -> None:
    """Tokens that the window still has come back exactly, others as their codes: the reference says which."""
    model, book = build("llama"), codebook_of("llama")
    inputs, starts = padded(2, 90) if is_padded else ({"input_ids": tokens(2, 90)}, [0, 0])
    caches = [PagedPQCache(model.config, book, SMALL), ReferenceCache(model.config, book, SMALL, starts)]
    logits: list[list[Tensor]] = [[], []]

    def forward(cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # as generate counts them: padding comes before 0
        logits: Tensor = model(ids, attention_mask=mask, position_ids=positions, **cache_kwargs(cache)).logits
        return logits

    for cache, out in zip(caches, logits, strict=True):
        mask = inputs.get("attention_mask", torch.ones(2, 90, dtype=torch.long))
        with torch.no_grad():
            forward(cache, inputs["input_ids"], mask)
            for step, count in enumerate(crops):
                cache.crop(-count)
                mask = mask[:, :-count]
                assert cache.get_seq_length() == mask.shape[1]
                for new in (1, 3, 1):
                    # Past a row's padding only: a row of padding alone would attend to nothing.
                    mask = torch.nn.functional.pad(mask, (0, new), value=1)
                    out.append(forward(cache, tokens(2, new, seed=step), mask))
    for a, b in zip(*logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_crop_to_nothing_frees_every_page() -> None:
    cache = filled(90)
    cache.crop(-90)
    assert cache.get_seq_length() == 0
    assert cache.stats()["pages_used"] == 0
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)


def test_a_deep_copy_shares_pages_and_goes_its_own_way() -> None:
    model, cache = build("llama"), filled(60)
    held = cache.stats()["bytes_reserved"]
    twin = copy.deepcopy(cache)
    assert slab_pointers(cache) == slab_pointers(twin)
    fixed = sum(cache.stats()["bytes"][kind] for kind in ("window", "tables", "codebooks"))
    assert twin.stats()["bytes_reserved"] == held >= fixed
    before = [layer.keys.clone() for layer in cache.layers]
    with torch.no_grad():
        model(tokens(2, 40), **cache_kwargs(twin))
    assert (cache.get_seq_length(), twin.get_seq_length()) == (60, 100)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert all(torch.equal(layer.keys[:, :, :36], keys[:, :, :36]) for layer, keys in zip(twin.layers, before, strict=True))
    allocator, shared = cache.storage.layers.allocator, cache.stats()["pages_used"]
    assert allocator.num_used == twin.stats()["pages_used"] > shared, "the prefix is there once"
    del twin
    assert allocator.num_used == shared, "what only the copy had is free"
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_a_cache_is_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(filled(20))
