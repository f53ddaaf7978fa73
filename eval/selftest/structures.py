"""Phase 1, data structures: pages, their owners, the order of their bytes, quantization, rows, sequences; runs no model."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from hf_pqcache.backends import dispatch
from hf_pqcache.cache.caches import PagedKVCache, PagedPQCache
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.codebook import normalise, pq
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.eval.selftest.checks import Check, Machine, expect, expect_close, expect_equal
from hf_pqcache.pages import layout
from hf_pqcache.pages.block_pool import MIN_SLAB, PageAllocator, PageTable
from hf_pqcache.pages.layout import PageLayout

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
SMALL = PQConfig(num_subspaces=8, num_bits=4, page_size=16, sink_tokens=4, extended_residual=16, max_pages=96)


def model_config(layers: int = LAYERS, heads: int = HEADS, kv_heads: int = HEADS, head_dim: int = HEAD_DIM) -> LlamaConfig:
    """The config of a model that is never built."""
    return LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
    )


def random_tokens(shape: tuple[int, ...], seed: int, machine: Machine, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(machine.device, dtype)


# -- pages and their owners ------------------------------------------------------------------------------------------
def page_allocator(machine: Machine) -> str:
    """Against a plain count: no page is lost, none has two owners that do not share it, memory follows what is used."""
    allocator, rng, steps = PageAllocator(), random.Random(0), 20_000 if machine.is_full else 3_000
    held: Counter[int] = Counter()
    for _ in range(steps):
        match rng.randrange(3):
            case 0:
                new = allocator.allocate(rng.randint(1, 8))
                expect(not any(held[page] for page in new), "free pages", f"{new}, of which some are in use")
                held.update(new)
            case 1 if held:
                page = rng.choice(list(held))
                allocator.share([page])
                held[page] += 1
            case 2 if held:
                page = rng.choice(list(held))
                allocator.release([page])
                held[page] -= 1
        held = +held
        expect_equal("pages in use", allocator.num_used, len(held))
    for page, count in held.items():
        expect_equal(f"references of page {page}", allocator.references(page), count)
        allocator.release([page] * count)
    expect_equal("pages in use at the end", allocator.num_used, 0)
    expect(allocator.num_reserved <= MIN_SLAB, f"memory for {MIN_SLAB} pages at the end", allocator.num_reserved)
    return f"{steps} random steps, every page accounted for"


def page_table(machine: Machine) -> str:
    allocator = PageAllocator()
    table = PageTable(allocator, 2, max_pages=20)
    table.reserve([3, 1])
    table.select([0, 0, 1, None])
    expect_equal("pages of a repeated row", table.rows[0], table.rows[1])
    expect_equal("pages in use after repeating rows", allocator.num_used, 4)
    (own,) = table.reserve([0] * 4, shared=[(1, 2)])
    expect(table.rows[1][2] == own != table.rows[0][2], "a page of its own for the row that writes", table.rows)
    before = [list(row) for row in table.rows]
    try:
        table.reserve([18, 18, 0, 0])
        expect(False, "PQC001 for more pages than there are", "no error")
    except PagesExhaustedError:
        expect_equal("page table after PQC001", table.rows, before)
    expect_equal("page table on a device", table.to_array(4)[2].tolist(), [*table.rows[2], -1, -1, -1])
    table.truncate([0] * 4)
    expect_equal("pages in use at the end", allocator.num_used, 0)
    return "repeated, split, exhausted, emptied"


# -- codes -----------------------------------------------------------------------------------------------------------
def layout_round_trip(machine: Machine) -> str:
    """Codes survive packing in the order of every kernel; the bits themselves are as the documentation says."""
    packed = layout.pack_bits(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 6)
    expect_equal("bytes of the 6-bit codes 1 2 3 4", packed.tolist(), [0x81, 0x30, 0x10])
    shapes = {tuple(codes) for _, both in dispatch.SHAPES for codes in both if codes is not None}
    shapes |= {(10, 5), (9, 7), (24, 8)}
    for m, bits in shapes:
        for page_size in (16, 48, 512) if machine.is_full else (16, 64):
            for which in get_args(Side):
                page = PageLayout(which, page_size, 2 * m, m, bits)
                codes = (random_tokens((2, page_size, m), 1, machine) * 1000).int().remainder(1 << bits).to(torch.uint8)
                numbers = random_tokens((2, page_size, 2 * m), 2, machine)
                scales = normalise.normalise(which, numbers)[1]
                blocks = page.pack(codes, **scales)
                expect_equal("bytes of a page", blocks.shape[-1], page.nbytes)
                found, kept = page.unpack(blocks)
                expect_equal(f"codes M={m} n={bits} unpacked", found, codes)
                for name, x in scales.items():
                    expect_equal(f"{name} of {which}s unpacked", kept[name], x)
    return f"{len(shapes)} shapes of codes"


def quantization(machine: Machine) -> str:
    """The nearest centroids by brute force in float64; what is normalised comes back, and a rotation is its own inverse."""
    for width, m, bits in ((2, 32, 8), (4, 8, 6), (2, 40, 5)):
        x = random_tokens((3, 2, 48, width * m), 1, machine)
        for sets in (1, m):
            centroids = random_tokens((sets, 1 << bits, width), 2, machine)
            codes = pq.encode(x, centroids)
            parts = x.double().unflatten(-1, (m, width))[..., None, :]
            distance = (parts - centroids.double()).square().sum(-1)  # (3, 2, T, M, C)
            chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
            expect_close(f"distance to the chosen centroids M={m} n={bits}", chosen, distance.amin(-1), 1e-6)
            expect_equal("codes of decoded vectors", pq.encode(pq.decode(codes, centroids), centroids), codes)
        rotated = normalise.rotate(x)
        expect_close("what was rotated twice", normalise.rotate(rotated), x, 1e-5)
        expect_close("keys that were normalised", normalise.restore_keys(*normalise.normalise_keys(rotated)), rotated, 1e-5)
        expect_close(
            "values that were normalised", normalise.restore_values(*normalise.normalise_values(rotated)), rotated, 1e-5
        )
    return "encoded, decoded, normalised"


# -- rows ------------------------------------------------------------------------------------------------------------
def _dense(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    kept = cache.layers[layer]
    return kept.seen() if hasattr(kept, "seen") else (kept.keys, kept.values)


def _drive(ours: Any, plain: Any, machine: Machine, steps: int, seed: int) -> None:
    """Random appends, crops, reorders, repeats and selections of rows on both caches; equal after each."""
    rng, rows = random.Random(seed), 2
    for step in range(steps):
        length = plain.get_seq_length()
        action = rng.choice(["append", "append", "step", "step", "crop", "reorder", "repeat", "select"])
        if length == 0 or (action == "append" and length < 150) or (action == "step" and length < 250):
            count = 1 if action == "step" and length else rng.randint(2, 60)
            for layer in range(LAYERS):
                k, v = (random_tokens((rows, HEADS, count, HEAD_DIM), 1000 * step + i, machine) for i in (layer, layer + 500))
                for cache in (ours, plain):
                    cache.update(k, v, layer)
                _ = ours.layers[layer].keys  # attention has seen the new tokens
        elif action == "crop":
            removed = rng.randint(1, length - 1) if length > 1 else 0
            for cache in (ours, plain):
                cache.crop(-removed)
        elif action == "reorder":
            index = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            for cache in (ours, plain):
                cache.reorder_cache(index)
        elif action == "repeat" and rows <= 2:
            rows *= 2
            for cache in (ours, plain):
                cache.batch_repeat_interleave(2)
        elif action == "select":
            index = torch.tensor([rng.randrange(rows) for _ in range(2)])
            rows = 2
            for cache in (ours, plain):
                cache.batch_select_indices(index)
        expect_equal(f"length after step {step} ({action})", ours.get_seq_length(), plain.get_seq_length())
        for layer in range(LAYERS):
            for name, got, want in zip(("keys", "values"), _dense(ours, layer), _dense(plain, layer), strict=True):
                expect_equal(f"{name} of layer {layer} after step {step} ({action})", got, want)
        _check_owners(ours)
    ours.reset()
    expect_equal("pages in use after reset", ours.stats()["pages_used"], 0)


def _check_owners(cache: Any) -> None:
    """Every page in use is in the page table as often as its count says."""
    storage = cache.storage
    found = Counter(page for row in storage.layers.table.rows for page in row)
    expect_equal("pages in use", storage.layers.allocator.num_used, len(found))
    counts = {page: storage.layers.allocator.references(page) for page in found}
    expect_equal("references of pages", counts, dict(found))


def coded_rows(machine: Machine) -> str:
    config, steps = model_config(), 300 if machine.is_full else 60
    ours, plain = PagedPQCache(config, pq_config=SMALL), ReferenceCache(config, pq_config=SMALL)
    _drive(ours, plain, machine, steps, seed=1)
    return f"{steps} random appends, crops, reorders, repeats and selections equal a dense cache"


def exact_rows(machine: Machine) -> str:
    config, steps = model_config(), 300 if machine.is_full else 60
    _drive(PagedKVCache(config, page_size=16, max_pages=96), DynamicCache(config=config), machine, steps, seed=2)
    return f"{steps} random steps equal DynamicCache"


def sequences(machine: Machine) -> str:
    """Sequences side by side: a fork shares pages and goes its own way, a freed page is reused at once."""
    cache = PagedKVCache(model_config(), page_size=16, max_pages=24)
    kept: dict[str, list[Tensor]] = {}

    def append(name: str, count: int, seed: int) -> None:
        new = random_tokens((2, HEADS, count, HEAD_DIM), seed, machine)
        kept[name] = [torch.cat(pair, dim=1) for pair in zip(kept[name], new, strict=True)] if name in kept else list(new)
        for layer in range(LAYERS):
            cache.append_tokens(name, layer, *new)

    def compare(*names: str) -> None:
        for name in names:
            for layer in range(LAYERS):
                for got, want in zip(cache.get_kv(name, layer), kept[name], strict=True):
                    expect_equal(f"tokens of sequence {name}", got, want)

    cache.allocate_sequence("a")
    append("a", 100, 1)
    cache.fork_sequence("a", "b")
    kept["b"] = list(kept["a"])
    expect_equal("pages of a sequence and its fork", cache.stats()["pages_used"], 6)
    append("a", 40, 2)
    append("b", 7, 3)
    cache.allocate_sequence("c", initial_len=64)
    append("c", 70, 4)
    compare("a", "b", "c")
    used = cache.stats()["pages_used"]
    try:
        cache.allocate_sequence("d", initial_len=1000)
        expect(False, "PQC001 for more pages than there are", "no error")
    except PagesExhaustedError:
        expect_equal("pages in use after PQC001", cache.stats()["pages_used"], used)
    cache.crop_sequence("a", 50)
    kept["a"] = [x[:, :50] for x in kept["a"]]
    cache.free_sequence("c")
    append("a", 30, 5)
    compare("a", "b")
    for name in ("a", "b"):
        cache.free_sequence(name)
    expect_equal("pages in use at the end", cache.stats()["pages_used"], 0)
    return "forked, cropped, exhausted, freed"


CHECKS = (
    Check("page allocator", 1, page_allocator),
    Check("page table", 1, page_table),
    Check("layout of pages", 1, layout_round_trip),
    Check("product quantization", 1, quantization),
    Check("rows of codes", 1, coded_rows),
    Check("rows of exact pages", 1, exact_rows),
    Check("sequences", 1, sequences),
)
