"""Model + text -> sampled keys and values -> k-means -> Codebook; knows no page and no cache of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_pqcache.codebook.codebook import Codebook, LayerCodebook, to_float16
from hf_pqcache.codebook.kmeans import Objective, kmeans
from hf_pqcache.codebook.samples import LiveSamples, Samples, compressible_layers
from hf_pqcache.config import PQConfig

__all__ = ["calibrate", "compressible_layers", "learn", "learn_layer"]

#: Lloyd steps. 12, 25 and 75 of them cost +0.26, +0.23 and +0.22 % of perplexity at 4 bits, in 3, 5 and 13 s on a GPU
#: (12 M-parameter Llama, WikiText-2 in stream mode, 65 536 calibration tokens).
ITERATIONS = 25


def learn(
    samples: Samples,
    config: PQConfig | None = None,
    *,
    merge: bool = False,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Codebook:
    """Second half of `calibrate`: k-means over samples, a layer at a time.

    Args:
        samples: live ones, or those of a file.
        merge: learn one set of centroids for all layers and heads, from an equal share of samples of each (as MILLION
            does, Wang et al. 2025); for comparison, it costs more than twice the loss.
        device: where k-means runs.

    Raises:
        ValueError: num_subspaces does not divide head_dim, samples are not finite, or layers that were to be merged
            differ in head_dim.
    """
    config = config or PQConfig()
    books: dict[int, LayerCodebook] = {}
    options: dict[str, Any] = {"objective": objective, "iterations": iterations}
    shapes = samples.shapes
    total = sum(2 * (1 if merge else heads) * config.subspaces(dk, dv) for heads, dk, dv in shapes.values())
    total //= len(shapes) if merge else 1
    with tqdm(total=total, desc="k-means", unit="subspace", disable=not progress, leave=False) as bar:
        for i, keys, values in [_merged(samples, seed)] if merge else samples.layers():
            name = "all layers" if merge else f"layer {i}"
            sides = (keys.to(device), values.to(device))
            layer = learn_layer(*sides, config, seed=seed * 65_537 + i, progress=bar.update, name=name, **options)
            books[i] = layer.to("cpu")
    if merge:
        one = books[0]
        books = {
            i: LayerCodebook(one.keys.repeat(heads, 1, 1, 1), one.values.repeat(heads, 1, 1, 1))
            for i, (heads, _, _) in shapes.items()
        }
    return Codebook(
        layers=books,
        num_bits=config.num_bits,
        num_subspaces=config.num_subspaces,
        metadata={**samples.metadata, "objective": objective, "iterations": iterations, "merged": merge},
    )


def _merged(samples: Samples, seed: int) -> tuple[int, Tensor, Tensor]:
    """Layer 0 with an equal share of every layer's and head's samples as its one head: keys (1, N, d), values (1, N, dv)."""
    widths = {shape[1:] for shape in samples.shapes.values()}
    if len(widths) > 1:
        raise ValueError(f"layers of different head_dim {sorted(widths)} cannot share one codebook; leave them apart")
    num_heads = sum(heads for heads, _, _ in samples.shapes.values())
    generator = torch.Generator().manual_seed(seed)
    keys, values = [], []
    for _, k, v in samples.layers():
        chosen = torch.randperm(samples.tokens, generator=generator)[: -(-samples.tokens // num_heads)]
        keys.append(k[:, chosen].flatten(0, 1))
        values.append(v[:, chosen].flatten(0, 1))
    return 0, torch.cat(keys)[None], torch.cat(values)[None]


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: str | Iterable[str] | Tensor,
    config: PQConfig | None = None,
    *,
    num_tokens: int = 65536,
    window: int | None = None,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    merge: bool = False,
    progress: bool = True,
    max_sample_bytes: int | None = None,
) -> Codebook:
    """Learn a codebook for `model` from text that its evaluation never sees.

    The text is cut into windows; a seeded choice of them goes through the model, each with fresh context, and the keys
    (after their rotary embedding) and values of every full-attention layer are sampled, those of as many layers at a
    time as host memory has room for (`LiveSamples`). The first `sink_tokens` of a window are left out: a cache keeps
    them exact, and their keys and values are like no others. One k-means runs for every layer, KV head, keys or values,
    and subspace (`kmeans`), on the model's device. A text with fewer than `num_tokens` tokens is a warning.

    Args:
        model: a transformers causal language model, in any dtype, on any device.
        tokenizer: its tokenizer.
        texts: one text or several documents, which are joined by the tokenizer's end-of-text token; or token ids,
            int64 (N), for which no tokenizer is needed.
        config: shape of the codes (num_subspaces, num_bits) and sink_tokens. None means PQConfig().
        num_tokens: how many tokens to sample; fewer if the text is shorter.
        window: tokens of one window; the model's training length is best. None means 2048, or what the model can hold.
        seed: of the choice of windows and of k-means.
        objective: "tail" or "plain", see `kmeans`.
        iterations: Lloyd steps.
        merge: one set of centroids for all layers and heads, see `learn`.
        progress: show progress bars.
        max_sample_bytes: of the samples in memory at once, see `LiveSamples`.

    Raises:
        ValueError: the text has fewer tokens than centroids, the window is longer than the model can hold, the model has
            no full-attention layer, num_subspaces does not divide its head_dim, or keys or values are not finite in
            float16.
    """
    taken: dict[str, Any] = {"num_tokens": num_tokens, "window": window, "seed": seed, "max_bytes": max_sample_bytes}
    samples = LiveSamples(model, tokenizer, texts, config, progress=progress, **taken)
    if samples.ids.numel() < num_tokens:
        warnings.warn(
            f"the calibration text has {samples.ids.numel():,} tokens, {num_tokens:,} were asked for: more text makes a better "
            "codebook; give a longer one, or a smaller num_tokens",
            stacklevel=2,
        )
    device = next(model.parameters()).device
    options: dict[str, Any] = {"objective": objective, "iterations": iterations, "merge": merge}
    return learn(samples, config, seed=seed, device=device, progress=progress, **options)


def learn_layer(
    keys: Tensor,
    values: Tensor,
    config: PQConfig,
    *,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    progress: Callable[[int], object] | None = None,
    name: str = "layer",
) -> LayerCodebook:
    """Centroids of one layer from samples: keys (H, N, d), values (H, N, dv) float -> LayerCodebook on their device.

    Raises ValueError if N is below the number of centroids, a sample is not finite or a centroid overflows float16.
    """
    num_subspaces = config.subspaces(keys.shape[2], values.shape[2])
    sides = []
    for kind, x in enumerate((keys, values)):
        heads, tokens, _ = x.shape
        parts = x.view(heads, tokens, num_subspaces, -1).transpose(1, 2).flatten(0, 1)  # (H * M, N, width)
        centroids = kmeans(
            parts,
            config.num_centroids,
            objective=objective,
            iterations=iterations,
            seed=2 * seed + kind,
            progress=progress,
        )
        sides.append(to_float16(centroids.unflatten(0, (heads, num_subspaces)), f"{name} {('keys', 'values')[kind]}"))
    return LayerCodebook(*sides)
