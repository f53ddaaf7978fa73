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
from hf_pqcache.backends.launch import Geometry
from hf_pqcache.codebook import normalise, pq
from hf_pqcache.config import CodeShape, PQConfig, Side
from hf_pqcache.pages.layout import PageLayout

SIDES: tuple[Side, Side] = ("key", "value")
ROTATED_BYTES = 600 * 2**20  # ten times the L2 cache of an H200
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One decode step of one layer: `tokens` held by each of `batch` rows, window included.

    bits: the operating point; 0: pages of exact tokens, as in PagedKVCache. keys, values: other codes than those of `bits`.
    """

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int = 128
    bits: int = 4
    page_size: int = 64
    dtype: str = "float16"
    keys: tuple[int, int] | None = None
    values: tuple[int, int] | None = None

    @property
    def is_exact(self) -> bool:
        return self.bits == 0

    @property
    def cache_config(self) -> PQConfig:
        if self.is_exact:
            return PQConfig(page_size=self.page_size, sink_tokens=0, extended_residual=1)
        return PQConfig(bits=self.bits, page_size=self.page_size)

    def codes(self, which: Side) -> CodeShape | None:
        if self.is_exact:
            return None
        given = self.keys if which == "key" else self.values
        return self.cache_config.codes(which, self.head_dim) if given is None else CodeShape(*given)

    def __str__(self) -> str:
        keys, values = (self.codes(which) for which in SIDES)
        if keys is None or values is None:
            codes = "exact pages"
        elif self.keys or self.values:
            codes = f"{keys.num_subspaces}x{keys.num_bits} + {values.num_subspaces}x{values.num_bits}"
        else:
            codes = f"bits={self.bits}"
        return f"({self.batch}, {self.kv_heads}, {self.group}, {self.tokens}) d={self.head_dim} {codes}"


DEFAULT_CASES = (
    Case(1, 32, 1, 131072),
    Case(1, 8, 4, 131072),
    Case(8, 8, 4, 32768),
    Case(1, 8, 8, 131072),
    Case(8, 8, 4, 32768, bits=2),
    Case(1, 8, 4, 131072, bits=2),
    Case(1, 8, 4, 131072, bits=3),
    Case(1, 8, 4, 32768),
    Case(1, 8, 4, 8192),
    Case(1, 8, 4, 2048),
    Case(1, 32, 1, 2048),
    Case(1, 8, 8, 2048),
    Case(16, 8, 4, 2048),
    Case(1, 8, 4, 32768, bits=0),
    Case(8, 8, 4, 32768, bits=0),
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
        self.layouts, self.centroids, self.side_bytes = [], [], []
        for which in SIDES:
            codes = case.codes(which)
            if codes is None:
                self.side_bytes.append(case.kv_heads * case.page_size * case.head_dim * 2)
                continue
            layout = PageLayout(which, case.page_size, case.head_dim, *codes)
            self.layouts.append(layout)
            self.side_bytes.append(-(-case.kv_heads * layout.nbytes // 64) * 64)
            book = (1, 1 << codes.num_bits, case.head_dim // codes.num_subspaces)
            self.centroids.append((torch.rand(book, device="cuda") * 2 - 1).half())
        stride = sum(self.side_bytes)
        per_set = case.batch * width
        self.coded_bytes = per_set * stride
        self.sets = max(1, min(16, math.ceil(ROTATED_BYTES / max(self.coded_bytes, 1))))
        num_pages = self.sets * per_set
        self.order = torch.randperm(num_pages, device="cuda", dtype=torch.int32).view(self.sets, case.batch, width)
        self.pool = torch.empty(num_pages, stride, dtype=torch.uint8, device="cuda")
        self._fill()
        window = (case.batch, case.kv_heads, config.sink_tokens + config.window_slots, case.head_dim)
        self.windows = [[torch.randn(window, device="cuda").to(dtype) for _ in SIDES] for _ in range(self.sets)]
        self.counts = torch.tensor([[case.tokens, coded]] * case.batch, dtype=torch.int32, device="cuda")
        self.starts = torch.zeros(case.batch, dtype=torch.int32, device="cuda")
        self.tables = [self.order[i].contiguous() for i in range(self.sets)]
        self.tickets = torch.zeros(case.batch * (1 + 2 * case.kv_heads), dtype=torch.int32, device="cuda")
        self.geometry = Geometry(
            case.head_dim, case.codes("key"), case.codes("value"), case.kv_heads, case.batch, case.page_size, stride,
            config.sink_tokens, config.window_slots, width,
        )  # fmt: skip
        base = self.pool.data_ptr()
        books = [c.data_ptr() for c in self.centroids] or [0, 0]
        self.equaliser = torch.ones(case.kv_heads, case.head_dim, device="cuda")
        after = [self.tickets.data_ptr(), 128, 0, 0, 0]  # attention needs neither gains nor cells
        rows = [
            [base, base + self.side_bytes[0], *books, self.equaliser.data_ptr(), *(w.data_ptr() for w in pair), *after]
            for pair in self.windows
        ]
        self.desc = torch.tensor(rows, device="cuda")
        heads = case.kv_heads * case.group
        self.query = torch.randn(case.batch, heads, 1, case.head_dim, device="cuda").to(dtype)
        # Compiled generate always passes a mask as wide as the cache; it is False beyond the row.
        self.mask = (torch.arange(case.tokens + 4096, device="cuda") < case.tokens)[None, None, None]
        self.bytes_moved = self.coded_bytes + 4 * case.batch * case.kv_heads * (case.tokens - coded) * case.head_dim

    def _pages(self, side: int) -> Tensor:
        """(pages, bytes): one side of the pool."""
        first, case = side * self.side_bytes[0], self.case
        size = case.page_size * case.head_dim * 2 if case.is_exact else self.layouts[side].nbytes
        return self.pool[:, first : first + case.kv_heads * size]

    def _fill(self) -> None:
        """Random numbers, or codes with the scales of such numbers."""
        for side, which in enumerate(SIDES):
            pages = self._pages(side)
            if self.case.is_exact:
                numbers = pages.view(getattr(torch, self.case.dtype))
                for part in range(0, len(numbers), 4096):
                    numbers[part : part + 4096] = torch.randn_like(numbers[part : part + 4096])
                continue
            layout = self.layouts[side]
            d = self.case.head_dim
            pages.random_(256)
            scales = pages[:, self.case.kv_heads * layout.code_bytes :].unflatten(1, (self.case.kv_heads, -1))
            if which == "value":
                scales.random_(164, 180)
            else:
                scales[..., d : 2 * d].random_(164, 176)
                scales[..., 2 * d :] = 0
                step = torch.rand(scales.shape[:-1], device="cuda").mul(0.002).half()
                scales[..., 2 * d : 2 * d + 2] = step[..., None].view(torch.uint8)

    def attend(self, i: int, is_masked: bool = False) -> Tensor:
        return cuda_backend.attend(
            self.query,
            cuda_backend.Place(self.desc, i, self.counts, self.starts, self.tables[i], self.geometry),
            self.mask if is_masked else None,
            None,
            self.case.head_dim**-0.5,
            0.0,
            self.case.tokens,
        )

    def tokens_of(self, i: int, row: int, which: Side) -> Tensor:
        """(H, tokens, d) in float64, as the storage says."""
        config, case, side = self.config, self.case, SIDES.index(which)
        coded, sinks = config.coded_tokens(case.tokens), config.sink_tokens
        stored = self._pages(side)[self.tables[i][row].long()]
        window = self.windows[i][side]
        if case.is_exact:
            exact = stored.view(window.dtype).unflatten(1, (case.kv_heads, case.page_size, case.head_dim))
            decoded = exact.transpose(0, 1).flatten(1, 2).double()
        else:
            codes, scales = self.layouts[side].unpack(self.layouts[side].split(stored))
            numbers = pq.decode(codes, self.centroids[side], torch.float64)
            scale = torch.exp2((scales["magnitude"].double() - 160) / 8)
            if which == "key":
                mean = scales["mean"].double() * scales["step"].double()[..., None]
                numbers = numbers * scale[..., None, :] + mean[..., None, :]
            else:
                numbers = numbers * scale[..., None]
            rotation = normalise.hadamard(case.head_dim, numbers.device).double()
            decoded = (numbers @ rotation).transpose(0, 1).flatten(1, 2)
        tokens = torch.arange(sinks + coded, case.tokens, device="cuda")
        slots = sinks + (tokens - sinks) % config.window_slots
        return torch.cat([window[row, :, :sinks].double(), decoded, window[row][:, slots].double()], dim=1)

    def error(self) -> float:
        """Relative L2 distance from float64 attention of the first set's output, without or with the mask: the larger."""
        case = self.case
        outs = [self.attend(0, is_masked).double()[:, 0] for is_masked in (False, True)]
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


def time_ours(case: Case, bandwidth: float) -> dict[str, float]:
    """Microseconds, error and floor of our kernel; the storage is freed again on return."""
    layers = Layers(case)
    tolerance = 1e-3 if case.dtype == "float16" else 4e-3
    error = layers.error()
    if not error < tolerance:
        raise RuntimeError(f"the kernel is wrong for {case}: relative L2 error {error:.2e}")
    result = {"floor_us": layers.bytes_moved / bandwidth * 1e6, "error": error}
    for is_masked, key in ((False, "ours_us"), (True, "masked_us")):
        calls = [partial(layers.attend, i, is_masked) for i in range(layers.sets)]
        result[key] = graph_time_us(calls * max(1, 4 // layers.sets))
    return result


def bench_case(case: Case, bandwidth: float, baseline: bool = True) -> dict[str, Any]:
    """Check, then time one case. Raises RuntimeError if the kernel is wrong."""
    result: dict[str, Any] = asdict(case) | time_ours(case, bandwidth)
    if baseline:
        result["fp16_us"] = time_sdpa(case)
        best = min(result["fp16_us"], key=result["fp16_us"].get)
        result["best_fp16"], result["best_fp16_us"] = best, result["fp16_us"][best]
        result["speedup"] = result["best_fp16_us"] / result["ours_us"]
    torch.cuda.empty_cache()
    return result


def bench_kernel(cases: Sequence[Case] = DEFAULT_CASES) -> Iterator[dict[str, Any]]:
    """Bench each case and print the table as it grows. Yields one dict a case."""
    if (missing := jit.why_unavailable()) is not None or not torch.cuda.is_available():
        raise RuntimeError(f"the kernel benchmark needs a GPU and CuPy: {missing or 'torch sees no CUDA device'}")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s (read + written) is the ceiling")
    columns = ("ours us", "masked us", "floor us", "fp16 us", "speedup", "rel. L2")
    print(f"{'(batch, KV heads, group, tokens)':42s}" + "".join(f"{name:>10s}" for name in columns))
    for case in cases:
        r = bench_case(case, bandwidth)
        times = [r["ours_us"], r["masked_us"], r["floor_us"], r["best_fp16_us"]]
        row = f"{case!s:42s}" + "".join(f"{us:10.1f}" for us in times) + f"{r['speedup']:9.2f}x"
        print(f"{row}{r['error']:10.1e} {r['best_fp16']}", flush=True)
        yield r | {"copy_tb_per_s": bandwidth / 1e12, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def main() -> None:
    print(json.dumps(list(bench_kernel())))


if __name__ == "__main__":
    main()
