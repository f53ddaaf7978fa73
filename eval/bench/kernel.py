"""Times decode attention over pages against every fp16 path of torch; knows kernels and storage, no models.

One run measures the copy bandwidth first, checks each case against float64, then times ours - also with a mask that hides
nothing, as compiled generate passes one - and SDPA (flash, cuDNN,
memory-efficient; the query as (B, Hq, 1, d) with enable_gqa and as (B, H, G, d)) by CUDA graphs over inputs that
rotate through more memory than the L2 cache holds.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_pqcache.backends import cuda_backend, jit
from hf_pqcache.config import PQConfig
from hf_pqcache.pages import layout
from hf_pqcache.pages.codec import CODED, EXACT
from hf_pqcache.pages.device_state import layer_row
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.pages.slabs import PageSpec, PageStore

ROTATED_BYTES = 600 * 2**20  # ten times the L2 cache of an H200
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One decode step of one layer: `tokens` held by each of `batch` rows, window included.

    num_subspaces = num_bits = 0: pages of exact tokens, as in PagedKVCache.
    """

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int = 128
    num_subspaces: int = 64
    num_bits: int = 8
    page_size: int = 64
    dtype: str = "float16"

    @property
    def is_exact(self) -> bool:
        return self.num_subspaces == 0

    @property
    def cache_config(self) -> PQConfig:
        if self.is_exact:
            return PQConfig(page_size=self.page_size, sink_tokens=0, extended_residual=1)
        return PQConfig(num_subspaces=self.num_subspaces, num_bits=self.num_bits, page_size=self.page_size)

    def __str__(self) -> str:
        codes = "exact pages" if self.is_exact else f"M={self.num_subspaces} n={self.num_bits}"
        shape = f"d={self.head_dim} {codes}"
        return f"({self.batch}, {self.kv_heads}, {self.group}, {self.tokens}) {shape}"


DEFAULT_CASES = (
    Case(1, 32, 1, 131072),
    Case(1, 8, 4, 131072),
    Case(8, 8, 4, 32768),
    Case(1, 8, 8, 131072),
    Case(8, 8, 4, 32768, num_subspaces=32),
    Case(1, 8, 4, 131072, num_subspaces=32),
    Case(1, 8, 4, 32768),
    Case(1, 8, 4, 8192),
    Case(1, 8, 4, 2048),
    Case(1, 32, 1, 2048),
    Case(1, 8, 8, 2048),
    Case(16, 8, 4, 2048),
    Case(1, 8, 4, 32768, num_subspaces=0, num_bits=0),
    Case(8, 8, 4, 32768, num_subspaces=0, num_bits=0),
)


def graph_time_us(
    calls: Sequence[Callable[[], Any]], replays: int = 15, warm_up_ms: float = 30.0, rest_s: float = 0.5
) -> float:
    """Median microseconds of one call; all calls are captured back to back in one CUDA graph.

    The device rests before: above some hundred watts it lowers its clock, and what is timed right after other work (the float64
    check above all) would pay for that with up to 10 %.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    time.sleep(rest_s)
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < warm_up_ms / 1e3:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    ordered = sorted(begin.elapsed_time(end) for begin, end in times)
    return ordered[len(ordered) // 2] * 1e3 / len(calls)


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read plus written: the ceiling."""
    x = torch.randint(0, 2**31 - 1, (ROTATED_BYTES // 4,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    return 2 * ROTATED_BYTES / (graph_time_us([lambda: y.copy_(x)]) * 1e-6)


class Layers:
    """Storage of one case, as `sets` layers that share a pool but no page, filled at random."""

    def __init__(self, case: Case) -> None:
        config = case.cache_config
        self.case, self.config = case, config
        coded = config.coded_tokens(case.tokens)
        width = coded // case.page_size
        dtype = getattr(torch, case.dtype)
        page_bytes = 2 * case.page_size * case.head_dim if case.is_exact else config.code_bytes(case.head_dim)
        per_set = case.batch * width
        self.coded_bytes = 2 * per_set * case.kv_heads * page_bytes
        self.sets = max(1, min(16, math.ceil(ROTATED_BYTES / max(self.coded_bytes, 1))))
        num_pages = self.sets * per_set
        order = torch.randperm(num_pages, device="cuda", dtype=torch.int32).view(self.sets, case.batch, width)
        window = (case.batch, case.kv_heads, config.sink_tokens + config.window_slots, case.head_dim)
        if case.is_exact:
            spec = PageSpec((case.kv_heads, case.page_size, case.head_dim), dtype)
            centroids = [torch.empty(0, device="cuda")] * 2
        else:
            spec = PageSpec((case.kv_heads, page_bytes), torch.uint8)
            books = (case.kv_heads, case.num_subspaces, 1 << case.num_bits, case.head_dim // case.num_subspaces)
            centroids = [torch.randn(books, device="cuda").half() for _ in range(2)]
        store = PageStore(spec, spec, torch.device("cuda", torch.cuda.current_device()))
        store.add(0, store.new_slab(0, num_pages))
        for side in store.slabs[0].keys, store.slabs[0].values:
            side.copy_(torch.randn_like(side) if case.is_exact else torch.randint_like(side, 256))
        self.views = [
            LayerView(
                config=config,
                num_subspaces=case.num_subspaces,
                pages=store,
                key_centroids=centroids[0],
                value_centroids=centroids[1],
                window_keys=torch.randn(window, device="cuda").to(dtype),
                window_values=torch.randn(window, device="cuda").to(dtype),
                seq_lens=torch.tensor([[case.tokens, coded]] * case.batch, dtype=torch.int32, device="cuda"),
                left_pad=torch.zeros(case.batch, dtype=torch.int32, device="cuda"),
                page_table=(2 * order[i]).contiguous(),  # the two sides of a page alternate
                codec=EXACT if case.is_exact else CODED,
            )
            for i in range(self.sets)
        ]
        self.geometry, self.books = cuda_backend.prepare_layer(self.views[0])
        self.desc = torch.tensor([layer_row(view, self.books) for view in self.views], device="cuda")
        heads = case.kv_heads * case.group
        self.query = torch.randn(case.batch, heads, 1, case.head_dim, device="cuda").to(dtype)
        # Compiled generate always passes a mask as wide as the cache; it is False beyond the row.
        self.mask = (torch.arange(case.tokens + 4096, device="cuda") < case.tokens)[None, None, None]
        self.bytes_moved = self.coded_bytes + 4 * case.batch * case.kv_heads * (case.tokens - coded) * case.head_dim

    def attend(self, i: int, name: str, is_masked: bool = False) -> Tensor:
        view = self.views[i]
        return cuda_backend.attend(
            self.query, self.desc, i, view.seq_lens, view.left_pad, view.page_table, self.mask if is_masked else None, None,
            self.geometry, self.case.head_dim**-0.5, 0.0, self.case.tokens, name,
        )  # fmt: skip

    def tokens_of(self, i: int, row: int, which: str) -> Tensor:
        """(H, tokens, d) in float64, as the storage says."""
        view, config, case = self.views[i], self.config, self.case
        coded, sinks = config.coded_tokens(case.tokens), config.sink_tokens
        slab = view.store.slabs[0]
        pages, centroids, window = (
            (slab.keys, view.key_centroids, view.window_keys)
            if which == "key"
            else (slab.values, view.value_centroids, view.window_values)
        )
        stored = pages[view.page_table[row].long() // 2]
        if case.is_exact:
            decoded = stored.transpose(0, 1).flatten(1, 2).double()
        else:
            order_of = layout.key_order if which == "key" else layout.value_order
            order = order_of(config.page_size, case.num_subspaces, config.num_bits)
            codes = layout.unpack_pages(stored, order, case.num_subspaces, config.num_bits)
            codes = codes.transpose(0, 1).flatten(1, 2)  # (H, coded, M)
            subspace = torch.arange(case.num_subspaces, device="cuda")
            parts = [centroids[h].double()[subspace, codes[h].long()].flatten(-2) for h in range(case.kv_heads)]
            decoded = torch.stack(parts)
        tokens = torch.arange(sinks + coded, case.tokens, device="cuda")
        slots = sinks + (tokens - sinks) % config.window_slots
        return torch.cat([window[row, :, :sinks].double(), decoded, window[row][:, slots].double()], dim=1)

    def error(self, name: str) -> float:
        """Relative L2 distance from float64 attention of the first set's output, without or with the mask: the larger."""
        case = self.case
        outs = [self.attend(0, name, is_masked).double()[:, 0] for is_masked in (False, True)]
        wrong, total = [0.0, 0.0], 0.0
        for row in range(case.batch):
            query = self.query[row, :, 0].double().view(case.kv_heads, case.group, case.head_dim)
            score = query @ self.tokens_of(0, row, "key").transpose(1, 2) * case.head_dim**-0.5
            want = (score.softmax(-1) @ self.tokens_of(0, row, "value")).flatten(0, 1)
            wrong = [sum_ + float((out[row] - want).square().sum()) for sum_, out in zip(wrong, outs, strict=True)]
            total += float(want.square().sum())
        return math.sqrt(max(wrong) / total)


def time_sdpa(case: Case) -> dict[str, float]:
    """Microseconds of every fp16 path that runs this case."""
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    per_set = 4 * math.prod(shape)
    sets = max(1, min(8, math.ceil(ROTATED_BYTES / per_set)))
    dtype = getattr(torch, case.dtype)
    keys, values = ([torch.randn(shape, dtype=dtype, device="cuda") for _ in range(sets)] for _ in range(2))
    plain = torch.randn(case.batch, case.kv_heads * case.group, 1, case.head_dim, dtype=dtype, device="cuda")
    grouped = plain.view(case.batch, case.kv_heads, case.group, case.head_dim)
    times = {}
    for name, backend in BACKENDS.items():
        for form, q in (("gqa", plain), ("rows", grouped)):
            if form == "rows" and case.group == 1:
                continue
            gqa = form == "gqa" and case.group > 1

            def call(i: int, q: Tensor = q, gqa: bool = gqa) -> Tensor:
                return F.scaled_dot_product_attention(q, keys[i], values[i], enable_gqa=gqa)

            try:
                with sdpa_kernel(backend), warnings.catch_warnings(action="ignore"):
                    calls = [lambda i=i: call(i) for i in range(sets)]
                    times[f"{name}/{form}"] = graph_time_us(calls * max(1, 4 // sets), 9)
            except RuntimeError:
                continue  # this backend does not take this case
    return times


def kernels_of(case: Case, names: Sequence[str]) -> Sequence[str]:
    """The kernels to time for a case: `names` where pages hold codes."""
    return ("paged",) if case.is_exact else names


def time_ours(case: Case, bandwidth: float, names: Sequence[str]) -> dict[str, float]:
    """Microseconds, error and floor of our kernels; the storage is freed again on return."""
    layers = Layers(case)
    tolerance = 1e-3 if case.dtype == "float16" else 4e-3
    result = {"floor_us": layers.bytes_moved / bandwidth * 1e6}
    for name in names:
        error = layers.error(name)
        if not error < tolerance:
            raise RuntimeError(f"{name} kernel is wrong for {case}: relative L2 error {error:.2e}")
        for is_masked, key in ((False, f"{name}_us"), (True, f"{name}_masked_us")):
            calls = [partial(layers.attend, i, name, is_masked) for i in range(layers.sets)]
            result[key] = graph_time_us(calls * max(1, 4 // layers.sets))
        result[f"{name}_error"] = error
    return result


def bench_case(case: Case, bandwidth: float, names: Sequence[str] = ("tuned",), baseline: bool = True) -> dict[str, Any]:
    """Check, then time one case; `names` are the kernels for codes. Raises RuntimeError if a kernel is wrong."""
    names = kernels_of(case, names)
    result: dict[str, Any] = asdict(case) | time_ours(case, bandwidth, names)
    if baseline:
        result["fp16_us"] = time_sdpa(case)
        best = min(result["fp16_us"], key=result["fp16_us"].get)
        result["best_fp16"], result["best_fp16_us"] = best, result["fp16_us"][best]
        result["speedup"] = result["best_fp16_us"] / result[f"{names[0]}_us"]
    torch.cuda.empty_cache()
    return result


def bench_kernel(cases: Sequence[Case] = DEFAULT_CASES, names: Sequence[str] = ("tuned",)) -> Iterator[dict[str, Any]]:
    """Bench each case and print the table as it grows. Yields one dict a case."""
    if (missing := jit.why_unavailable()) is not None or not torch.cuda.is_available():
        raise RuntimeError(f"the kernel benchmark needs a GPU and CuPy: {missing or 'torch sees no CUDA device'}")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s (read + written) is the ceiling")
    columns = ("ours us", "masked us", "floor us", "fp16 us", "speedup", "rel. L2")
    print(f"{'(batch, KV heads, group, tokens)':42s}" + "".join(f"{name:>10s}" for name in columns))
    for case in cases:
        r = bench_case(case, bandwidth, names)
        name = kernels_of(case, names)[0]
        times = [r[f"{name}_us"], r[f"{name}_masked_us"], r["floor_us"], r["best_fp16_us"]]
        row = f"{case!s:42s}" + "".join(f"{us:10.1f}" for us in times) + f"{r['speedup']:9.2f}x"
        print(f"{row}{r[f'{name}_error']:10.1e} {r['best_fp16']}", flush=True)
        yield r | {"copy_tb_per_s": bandwidth / 1e12, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def main() -> None:
    print(json.dumps(list(bench_kernel())))


if __name__ == "__main__":
    main()
