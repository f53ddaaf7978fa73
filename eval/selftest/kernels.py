"""Phase 2, kernels: every engine that this machine has, through the cache that uses it, against float64; no model runs.

What is compared is what users run: tokens go in through `update`, so that the kernels that encode and append are met, and
come out through the attention of a layer. The reference reads the stored codes and does the rest in float64.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.backends import diagnose, dispatch, jit, nvrtc
from hf_pqcache.cache.caches import PagedKVCache, PagedPQCache
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.eval.selftest.checks import REPORT, Check, CheckFailed, CheckSkipped, Machine, expect, expect_close
from hf_pqcache.eval.selftest.structures import model_config, random_tokens
from hf_pqcache.pages.codec import CodedPages
from hf_pqcache.pages.layer_kv import LayerView

#: Rounding of probabilities and of the output: relative L2 distance from float64.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
GROUP, KV_HEADS = 4, 2
#: (head_dim, what else shapes the codes).
Shape = tuple[int, dict[str, int]]
QUICK_SHAPES: tuple[Shape, ...] = ((128, {"bits": 4}), (64, {"bits": 4}), (128, {"bits": 2}))
FULL_SHAPES: tuple[Shape, ...] = tuple((d, {"bits": bits}) for d in (64, 128) for bits in (4, 3, 2))
FULL_SHAPES += (
    (128, {"num_subspaces": 128, "num_bits": 4}),
    (128, {"num_subspaces": 32, "num_bits": 6}),
    (64, {"num_bits": 6}),
)
OTHER_SHAPES: tuple[Shape, ...] = (
    (80, {"num_bits": 5}),
    (128, {"num_subspaces": 8}),
    (96, {"num_subspaces": 24, "num_bits": 7}),
)
FIX = "set HF_PQCACHE_KERNEL=torch, which is slow and needs no kernel, until it is mended; "


def _fix(engine: str) -> str:
    return REPORT if engine == "torch" else FIX + REPORT


@contextmanager
def forced(engine: str) -> Iterator[None]:
    """Force an engine as a user would; an empty name lets the cache choose."""
    before = os.environ.get("HF_PQCACHE_KERNEL")
    try:
        if engine:
            os.environ["HF_PQCACHE_KERNEL"] = engine
        else:
            os.environ.pop("HF_PQCACHE_KERNEL", None)
        yield
    finally:
        os.environ.pop("HF_PQCACHE_KERNEL", None)
        if before is not None:
            os.environ["HF_PQCACHE_KERNEL"] = before


class Filled:
    """A cache of one layer whose rows hold `lengths` tokens: a padded prompt and then some decode steps.

    keys, values: (B, H, n, d) as they went in, left padding included.
    """

    def __init__(
        self, machine: Machine, shape: Shape | None, dtype: torch.dtype, lengths: list[int], head_dim: int = 0
    ) -> None:
        head_dim = shape[0] if shape else head_dim
        config = model_config(1, GROUP * KV_HEADS, KV_HEADS, head_dim)
        self.cache: Any
        if shape is None:
            self.cache = PagedKVCache(config, page_size=32, max_pages=256)
        else:
            settings = PQConfig(**shape[1], page_size=32, extended_residual=24, max_pages=256)
            self.cache = PagedPQCache(config, pq_config=settings, compile=False)
        steps, total = 40, max(lengths)
        self.starts = [total - length for length in lengths]
        full = (2, len(lengths), KV_HEADS, total, head_dim)
        self.keys, self.values = random_tokens(full, 7, machine, dtype)
        prompt = total - steps
        mask = torch.ones(len(lengths), prompt, dtype=torch.bool, device=machine.device)
        for row, start in enumerate(self.starts):
            mask[row, :start] = False
        self.layer = self.cache.layers[0]
        self.cache.update(self.keys[:, :, :prompt], self.values[:, :, :prompt], 0)
        self.layer = self.cache.layers[0]
        self.layer.commit(mask, mask.cumsum(-1) - 1)
        for t in range(prompt, total):
            self.cache.update(self.keys[:, :, t : t + 1], self.values[:, :, t : t + 1], 0)

    @property
    def view(self) -> LayerView:
        view: LayerView = self.cache.storage.layers.views[0]
        return view

    def held(self, which: Side, row: int) -> tuple[Tensor, Tensor]:
        """A row's keys or values in float64 as the cache has them, and as they went in: (H, n, d) each."""
        view = self.view
        given = (self.keys if which == "key" else self.values)[row, :, self.starts[row] :].double()
        coded, sinks = view.coded_tokens(given.shape[1]), view.config.sink_tokens
        pages = view.store.read(which, view.page_numbers(row, 0, coded // view.config.page_size))
        decoded = view.codec(which).decode(pages, torch.float64)
        return torch.cat([given[:, :sinks], decoded.double(), given[:, sinks + coded :]], dim=1), given

    def attend(
        self, q: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(the engine's output, float64) of one query token of each row, (B, 1, Hq, d)."""
        scale = q.shape[-1] ** -0.5
        got = self.layer.attend(q, mask, sinks, scale, softcap, q.shape[-1])
        want = torch.zeros(got.shape, dtype=torch.float64, device=q.device)
        for row in range(q.shape[0]):
            keys, values = self.held("key", row)[0], self.held("value", row)[0]
            scores = q[row, :, 0].double().view(KV_HEADS, GROUP, -1) @ keys.mT * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                line = mask[row, 0, 0, self.starts[row] :]
                scores = scores.masked_fill(~line, -torch.inf) if line.dtype == torch.bool else scores + line.double()
            if sinks is not None:
                scores = torch.cat([scores, sinks.double().view(KV_HEADS, GROUP, 1)], dim=-1)
            want[row, 0] = (scores.softmax(-1)[..., : keys.shape[1]] @ values).flatten(0, 1)
        return got, want


def _check_codes(filled: Filled, what: str, fix: str) -> None:
    """What the engine has coded loses no more than plain torch's coding of the same pages does."""
    view = filled.view
    sides: tuple[Side, Side] = ("key", "value")
    for which in sides:
        codec = view.codec(which)
        assert isinstance(codec, CodedPages)
        for row in range(len(filled.starts)):
            held, given = filled.held(which, row)
            first, count = view.config.sink_tokens, view.coded_tokens(given.shape[1])
            if not count:
                continue
            held, given = held[:, first : first + count], given[:, first : first + count]
            plain = codec.decode(codec.encode(given.to(filled.keys.dtype)), torch.float64)
            lost, must = float((held - given).norm()), float((plain - given).norm())
            expect(
                lost < 1.001 * must,
                f"{what}: {which}s coded as well as plain torch does",
                f"{lost / must - 1:.2%} more lost",
                fix,
            )


def check_engine(machine: Machine, engine: str, shape: Shape | None, dtype: torch.dtype, head_dim: int = 0) -> None:
    """One engine for codes of a shape (None: exact pages): encoding, appending and attention with all it may be asked."""
    name = f"exact pages d={head_dim}" if shape is None else f"d={shape[0]} {dispatch.codes_text(_codes(shape))}"
    what, fix = f"{engine} {name} {str(dtype).removeprefix('torch.')}", _fix(engine)
    with forced("" if engine == "exact" else engine):  # exact pages have one kernel: nothing to choose
        filled = Filled(machine, shape, dtype, [700, 300, 45], head_dim)
        if shape is not None:
            _check_codes(filled, what, fix)
        head_dim = filled.keys.shape[-1]
        q = random_tokens((3, GROUP * KV_HEADS, 1, head_dim), 8, machine, dtype)
        boolean = torch.rand(3, 1, 1, 700, generator=torch.Generator().manual_seed(9)).to(machine.device) > 0.3
        boolean[..., -1] = True
        additive = torch.where(boolean, 0.5 * random_tokens((3, 1, 1, 700), 10, machine), torch.finfo(dtype).min).to(dtype)
        sinks = random_tokens((GROUP * KV_HEADS,), 11, machine, dtype)
        calls: tuple[tuple[str, dict[str, Any]], ...] = (
            ("", {}),
            (" with a mask", {"mask": boolean}),
            (" with an additive mask, sinks and softcap", {"mask": additive, "sinks": sinks, "softcap": 5.0}),
        )
        for more, arguments in calls:
            expect_close(what + more, *filled.attend(q, **arguments), bound=BOUNDS[dtype], fix=fix)
        ran = filled.cache.stats()["calls"]
    expect(ran.get(f"attend/{engine}") == len(calls), f"attention by the {engine} engine", ran, fix)


def _codes(shape: Shape) -> dispatch.Codes:
    config = PQConfig(**shape[1])
    return config.codes("key", shape[0]), config.codes("value", shape[0])


def plain_torch(machine: Machine) -> str:
    shapes = (*FULL_SHAPES, *OTHER_SHAPES) if machine.is_full else (QUICK_SHAPES[1], OTHER_SHAPES[0], QUICK_SHAPES[2])
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if machine.is_full else (torch.float32, torch.float16)
    for shape in shapes:
        for dtype in dtypes:
            check_engine(machine, "torch", shape, dtype)
    check_engine(machine, "torch", None, torch.float32, head_dim=64)
    return f"{len(shapes)} shapes on {machine.device.type} agree with float64"


def _kernels_or_skip(machine: Machine) -> None:
    if machine.device.type != "cuda":
        raise CheckSkipped("no GPU")
    if (why := jit.why_unavailable()) is not None:
        raise CheckFailed("kernels on this GPU", why, "run `pqcache doctor`, which says the line to type")


def _dtypes(machine: Machine) -> tuple[torch.dtype, ...]:
    """Every kernel is compiled anew for a dtype, which takes seconds."""
    return (torch.float16, torch.bfloat16) if machine.is_full else (torch.bfloat16,)


def _check_shapes(machine: Machine, engine: str, quick: Sequence[Shape], full: Sequence[Shape]) -> str:
    _kernels_or_skip(machine)
    shapes = full if machine.is_full else quick
    for shape in shapes:
        for dtype in _dtypes(machine):
            check_engine(machine, engine, shape, dtype)
    return f"{len(shapes)} shapes: encode, append and attend agree with float64"


def tuned_kernels(machine: Machine) -> str:
    tuned = [shape for shape in FULL_SHAPES if dispatch.kind_of(_codes(shape)) == "tuned"]
    return _check_shapes(machine, "tuned", [shape for shape in QUICK_SHAPES if shape in tuned], tuned)


def generic_kernel(machine: Machine) -> str:
    return _check_shapes(machine, "generic", OTHER_SHAPES[:1], OTHER_SHAPES)


def exact_pages(machine: Machine) -> str:
    _kernels_or_skip(machine)
    for head_dim in (64, 128, 256) if machine.is_full else (128,):
        for dtype in _dtypes(machine):
            check_engine(machine, "exact", None, dtype, head_dim=head_dim)
    return "append and attend agree with float64"


def compilation(machine: Machine) -> str:
    """For machines whose kernels cannot be run here: that they compile."""
    if machine.device.type == "cuda":
        raise CheckSkipped("the kernels run here, see above")
    if nvrtc.find() is None:
        raise CheckSkipped("no GPU and no NVRTC library (pip install nvidia-cuda-nvrtc-cu12)")
    shapes = dispatch.SHAPES if machine.is_full else [*dispatch.SHAPES[3:4], *dispatch.SHAPES[-2:]]
    targets = dict(list(diagnose.ARCHITECTURES.items())[0 if machine.is_full else -1 :])
    for head_dim, codes in shapes:
        errors = diagnose.kernel_errors(head_dim, codes, targets)
        expect(not errors, f"kernels d={head_dim} {codes} that compile", "; ".join(errors))
    return f"{len(shapes)} shapes compile for {', '.join(f'sm_{major}{minor}' for major, minor in targets)}"


CHECKS = (
    Check("plain torch", 2, plain_torch),
    Check("tuned kernels", 2, tuned_kernels),
    Check("generic kernel", 2, generic_kernel),
    Check("exact pages", 2, exact_pages),
    Check("compilation", 2, compilation),
)
