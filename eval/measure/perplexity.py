"""Perplexity of a text under exact or product-quantized keys and values; simulates the cache, so it needs none.

Four modes. `exact` is the usual strided perplexity. `distort` has no recent window: every key and value of a whole page,
the newest included, is replaced by its decoded code (how MILLION, Wang et al. 2025, reports it; without normalisation, as
there, every token is). `stream` is what a deployed cache does token by token: for every query the sinks and the recent
window are exact and the tokens between are decoded codes; all queries of a window run in one forward pass. `forget` is the
same cache with those tokens gone: how much worse it gets tells how much of a text hangs on them at all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_pqcache import arguments
from hf_pqcache.attention.functions import call_eager_function
from hf_pqcache.codebook import normalise, pq, shipped
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.codebook.samples import compressible_layers
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.eval.measure.shares import Each, one_by_one, summed
from hf_pqcache.eval.session.caches import codes_of, head_dim_of
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.models.positions import check_positions, max_positions
from hf_pqcache.pages.codec import CodedPages

Mode = Literal["exact", "distort", "stream", "forget"]
MODES = ("exact", "distort", "stream", "forget")

#: Scores (64 MiB of float32) that the stream simulation holds at once; logits cast to float32 at once.
_SCORE_NUMBERS = 1 << 24
_LOSS_NUMBERS = 1 << 24


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and the conditions it was measured under.

    Attributes:
        value: exp of the mean negative log-likelihood of the scored tokens.
        tokens: how many were scored. windows: how many forward passes that took.
        window, stride: tokens of one pass, and by how many the next one starts later.
        mode: exact, distort, stream or forget. codebook: fingerprint of the model's own, if it was used.
        config: shape of the simulated cache, None in exact mode.
    """

    value: float
    tokens: int
    windows: int
    window: int
    stride: int
    mode: Mode
    codebook: str | None = None
    config: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Tensor,
    *,
    window: int = 4096,
    stride: int | None = None,
    mode: Mode = "exact",
    codebook: Codebook | None = None,
    config: PQConfig | None = None,
    max_windows: int | None = None,
    progress: bool = True,
    each: Each = one_by_one,
) -> PerplexityResult:
    """Perplexity of `text` in windows of fresh context.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; unused (may be None) when `text` is a tensor.
        text: the text, tokenized once without special tokens, or its token ids, int64 (N).
        window: tokens the model sees at once.
        stride: the next window starts this many tokens later; only tokens not scored yet are scored, the rest is
            context. None means `window`: no overlap.
        mode: "exact", "distort", "stream" or "forget", see the module's head.
        codebook: the model's own, for distort and stream; None is the one that comes with the package.
        config: shape of the simulated cache; a codebook decides how vectors are cut and coded. None means the codebook's
            settings, or the defaults.
        max_windows: stop after so many windows.
        progress: show a progress bar. each: how windows are gone through, see `shares.py`.

    Raises:
        ValueError: fewer than two tokens, an impossible window or stride, a codebook of another model.
    """
    arguments.check_codebook(codebook)
    arguments.check_pq_config(config)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {MODES}")
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window={window} and stride={stride}: use a window of 2 or more, and a stride from 1 to window")
    if codebook is not None:
        codebook.check_model(model.config)
    config = config or PQConfig(**(codebook.settings if codebook is not None else {}))
    if codebook is not None and (width := head_dim_of(model.config)):
        config = config.replace(**codes_of(codebook, width))
    ids = text if isinstance(text, Tensor) else token_ids(tokenizer, text)
    parts = list(spans(ids.numel(), window, stride))[:max_windows]
    if not parts:
        raise ValueError(f"the text has {ids.numel()} tokens; perplexity needs at least two")
    check_positions(min(window, ids.numel()), max_positions(model.config), "a perplexity window", "the window")

    was_training = model.training
    model.eval()
    try:
        told: dict[str, Any] = {"desc": f"perplexity, {mode}", "unit": "window", "disable": not progress, "leave": False}
        with simulated_attention(model, codebook, config, mode), tqdm(total=len(parts), **told) as bar:
            total = _loss(model, ids, parts, each, bar)
    finally:
        model.train(was_training)
    count = sum(end - first for _, end, first in parts)
    return PerplexityResult(
        value=math.exp(min(total / count, 700.0)),
        tokens=count,
        windows=len(parts),
        window=window,
        stride=stride,
        mode=mode,
        codebook=codebook.fingerprint if codebook is not None and mode in ("distort", "stream") else None,
        config=config.to_dict() if mode != "exact" else None,
    )


@contextmanager
def simulated_attention(model: Any, codebook: Codebook | None, config: PQConfig, mode: Mode) -> Iterator[None]:
    """Within it, `model` run without a cache attends as if its keys and values were compressed, see `perplexity`.

    The attention function is replaced under the name that the model looks up, for every model of the process that uses
    the same name, and put back at the end, after an error too.
    """
    if mode == "exact":
        yield
        return
    name = model.config.get_text_config(decoder=True)._attn_implementation or "eager"
    original = ALL_ATTENTION_FUNCTIONS.get(name, call_eager_function if name == "eager" else None)
    if original is None:
        raise ValueError(f"attn_implementation={name!r} is not registered with transformers; load the model with 'sdpa'")
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    had_entry = name in local
    simulation = _Simulation(original, compressible_layers(model.config), codebook, config, mode)
    ALL_ATTENTION_FUNCTIONS[name] = simulation
    try:
        yield
    finally:
        if had_entry:
            ALL_ATTENTION_FUNCTIONS[name] = original
        else:
            local.pop(name, None)
    if simulation.calls == 0:
        raise ValueError(
            f"{type(model).__name__} never called its attention function {name!r}, so nothing was compressed: it does "
            "not use transformers' attention interface"
        )


class _Simulation:
    """An attention function that compresses some layers and is the original for all others."""

    def __init__(
        self, original: Callable[..., Any], layers: Sequence[int], book: Codebook | None, config: PQConfig, mode: Mode
    ) -> None:
        self.original, self.layers, self.book, self.config, self.mode = original, layers, book, config, mode
        self.calls = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kw: Any,
    ) -> Any:
        if getattr(module, "layer_idx", -1) not in self.layers:
            return self.original(module, query, key, value, attention_mask, *args, **kw)
        self.calls += 1
        coded_key, coded_value = (key, value) if self.mode == "forget" else self._coded(key, value)
        if self.mode == "distort":
            return self.original(module, query, coded_key, coded_value, attention_mask, *args, **kw)
        if kw.get("position_bias") is not None or key.shape[2] != query.shape[2]:
            raise ValueError("stream mode handles causal attention over one fresh window, without a position bias")
        scale = kw.get("scaling")
        out = stream_attention(
            query,
            (key, value),
            (coded_key, coded_value),
            self.config,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            softcap=kw.get("softcap"),
            sinks=kw.get("s_aux"),
            sliding_window=kw.get("sliding_window"),
            mask=attention_mask,
            forgets=self.mode == "forget",
        )
        return out.transpose(1, 2).contiguous(), None

    def _coded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, n, d) and values (B, H, n, dv) as their codes give them back; both exact where none can cut them."""
        try:
            book = self.book or shipped.codebook(self.config, key.shape[-1], value.shape[-1])
        except ValueError:  # so does the cache
            return key, value
        return self._side("key", key, book), self._side("value", value, book)

    def _side(self, which: Side, x: Tensor, book: Codebook) -> Tensor:
        if not book.is_normalised:
            centroids = book.to(x.device).side(which)
            return pq.decode(pq.encode(x, centroids), centroids, dtype=x.dtype)
        page, begin, out = self.config.page_size, self.config.sink_tokens, x.clone()
        end = begin + max(0, x.shape[2] - begin) // page * page
        if end == begin:
            return out
        codec = CodedPages.like(x, which, page, book)
        if which == "key":  # the cache makes it of what it codes first: token by token of a page, of a prompt of all
            first = page if self.mode == "stream" else min(end - begin, normalise.EQUALISER_TOKENS)
            codec = replace(codec, equaliser=normalise.equaliser(x[0, :, begin : begin + first]))
        for row in out[:, :, begin:end]:
            row.copy_(codec.decode(codec.encode(row), x.dtype))
        return out


def stream_attention(
    q: Tensor,
    exact: tuple[Tensor, Tensor],
    coded: tuple[Tensor, Tensor],
    config: PQConfig,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    mask: Tensor | None = None,
    forgets: bool = False,
) -> Tensor:
    """Causal attention in which query t sees keys and values as a cache of t + 1 tokens holds them.

    Key j is exact if j < sink_tokens or j >= sink_tokens + config.coded_tokens(t + 1), else it is its decoded code.
    Arithmetic is in float32, queries come in chunks.

    Args:
        q: (B, Hq, T, d).
        exact: keys (B, H, T, d) and values (B, H, T, dv).
        coded: the same, decoded from their codes.
        config: where the exact window lies.
        scale: factor of the scores. softcap: softcap * tanh(score / softcap) if given.
        sinks: a learned score a query head (Hq) that takes its share of the softmax and adds nothing (gpt-oss).
        sliding_window: only so many newest keys are seen, if given.
        mask: 4D, bool (True is seen) or additive; combined with the causal one.
        forgets: coded keys are not seen at all.

    Returns:
        (B, Hq, T, dv) of q's dtype.
    """
    batch, query_heads, length, _ = q.shape
    heads = exact[0].shape[1]
    groups = query_heads // heads
    near_k, near_v, far_k, far_v = (x.float() for x in (*exact, *coded))
    position = torch.arange(length, device=q.device)
    coded_end = torch.tensor([config.sink_tokens + config.coded_tokens(t + 1) for t in range(length)], device=q.device)
    out = q.new_empty(batch, query_heads, length, near_v.shape[-1])
    step = max(1, _SCORE_NUMBERS // (batch * query_heads * length))
    for begin in range(0, length, step):
        end = min(begin + step, length)
        rows, keys = position[begin:end, None], position[:end]
        is_far = (keys >= config.sink_tokens) & (keys < coded_end[begin:end, None])  # (t, n)
        is_seen = keys <= rows
        if sliding_window:
            is_seen &= keys > rows - sliding_window
        part = q[:, :, begin:end].float().reshape(batch, heads, groups * (end - begin), -1)
        scores = part @ near_k[:, :, :end].transpose(2, 3)
        scores = scores.view(batch, heads, groups, end - begin, end)
        far = (part @ far_k[:, :, :end].transpose(2, 3)).view_as(scores)
        scores = torch.where(is_far, far, scores).mul_(scale)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill_(~is_seen, float("-inf")).view(batch, query_heads, end - begin, end)
        if forgets:
            scores = scores.masked_fill(is_far, float("-inf"))
        if isinstance(mask, Tensor):
            extra = mask[..., begin:end, :end]
            scores = scores.masked_fill(~extra, float("-inf")) if extra.dtype == torch.bool else scores + extra.float()
        if sinks is not None:
            column = sinks.float().view(1, -1, 1, 1).expand(batch, -1, end - begin, 1)
            probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            probs = scores.softmax(-1)
        probs = probs.view(batch, heads, groups, end - begin, end)
        from_far = (probs * is_far).view(batch, heads, -1, end) @ far_v[:, :, :end]
        from_near = probs.masked_fill(is_far, 0.0).view(batch, heads, -1, end) @ near_v[:, :, :end]
        out[:, :, begin:end] = (from_far + from_near).view(batch, query_heads, end - begin, -1).to(q.dtype)
    return out


def spans(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored token) of every window; a window's first token has no context and is never scored."""
    scored = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        first = max(begin + 1, scored)
        if first < end:
            yield begin, end, first
        scored = end
        if end == num_tokens:
            return


def _loss(model: Any, ids: Tensor, parts: Sequence[tuple[int, int, int]], each: Each, bar: Any) -> float:
    """Sum of all windows' -log p."""
    device = next(model.parameters()).device

    def loss(i: int) -> float:
        begin, end, first = parts[i]
        bar.update()
        return _negative_log_likelihood(model, ids[begin:end].to(device), first - begin)

    return summed(each(len(parts), loss))


def _negative_log_likelihood(model: Any, ids: Tensor, first: int) -> float:
    """Sum over tokens first.. of ids (n) of -log p(token | those before), logits cast to float32 a chunk at a time."""
    needed = ids.numel() - first + 1  # the last position predicts nothing; dropped below
    keep = {"logits_to_keep": needed} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids[None], use_cache=False, **keep).logits[0, -needed:-1]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    step = max(1, _LOSS_NUMBERS // logits.shape[-1])
    for start in range(0, logits.shape[0], step):
        targets = ids[first + start : first + start + step].to(logits.device)
        loss = F.cross_entropy(logits[start : start + step].float(), targets, reduction="none")
        total += loss.double().sum()
    return float(total)
