"""Model + text -> sampled keys and values -> k-means -> Codebook; knows no page and no cache of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_pqcache.codebook import normalise as normalising
from hf_pqcache.codebook import pq
from hf_pqcache.codebook.codebook import Codebook, to_float16
from hf_pqcache.codebook.kmeans import Objective, kmeans
from hf_pqcache.codebook.samples import LiveSamples, Samples, compressible_layers
from hf_pqcache.config import PQConfig, Side

__all__ = ["calibrate", "compressible_layers", "learn"]

#: Lloyd steps: three times as many gained a hundredth of a percent of perplexity at 4 bits, half as many lost three.
ITERATIONS = 25
#: Vectors of a side that k-means sees at most.
MOST_SAMPLES = 1 << 16
KEY_GAIN_POWER = 0.7


def learn(
    samples: Samples,
    config: PQConfig | None = None,
    *,
    normalise: bool = True,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Codebook:
    """Second half of `calibrate`: k-means over samples.

    Args:
        samples: live ones, or those of a file. All layers and heads give an equal share.
        normalise: learn from normalised keys and values. False is MILLION's way (Wang et al. 2025), with a set of centroids
            for each subspace of keys and values as they are; for comparison, no cache takes such a codebook.
        device: where k-means runs.

    Raises:
        ValueError: num_subspaces does not divide head_dim, samples are not finite, or layers differ in head_dim and
            are not normalised.
    """
    config = config or PQConfig()
    shapes = samples.shapes
    _, head_dim, value_dim = next(iter(shapes.values()))
    if not normalise and len({shape[1:] for shape in shapes.values()}) > 1:
        raise ValueError("layers of different head_dim cannot share MILLION's codebook: its subspaces are those of one")
    dims: dict[Side, int] = {"key": head_dim, "value": value_dim}
    shapes_of_codes = {which: config.codes(which, dim) for which, dim in dims.items()}
    width = {which: dim // shapes_of_codes[which].num_subspaces for which, dim in dims.items()}
    share = -(-MOST_SAMPLES // sum(heads for heads, _, _ in shapes.values()))
    generator = torch.Generator().manual_seed(seed)
    parts: dict[Side, list[Tensor]] = {"key": [], "value": []}
    for _, keys, values in samples.layers():
        for which, x in zip(dims, (keys, values), strict=True):
            for head in x:
                own = _parts(head, which, width[which], config.page_size if normalise else 0)  # (sets, n, width)
                chosen = torch.randperm(own.shape[1], generator=generator)[:share]
                parts[which].append(own[:, chosen])
    sides: list[Tensor] = []
    gains: list[float] = []
    with tqdm(total=2, desc="k-means", unit="side", disable=not progress, leave=False) as bar:
        for which, found in parts.items():
            x = torch.cat(found, 1).float().to(device)
            options: dict[str, Any] = {"objective": objective, "iterations": iterations, "seed": 2 * seed + len(sides)}
            centroids = kmeans(x, 1 << shapes_of_codes[which].num_bits, **options)
            gains.append(gain_of(which, x[0], centroids) if normalise else 1.0)
            sides.append(to_float16(gains[-1] * centroids, f"{which}s").cpu())
            bar.update()
    metadata = {**samples.metadata, "objective": objective, "iterations": iterations, "normalised": normalise}
    return Codebook(sides[0], sides[1], (gains[0], gains[1]), metadata=metadata)


def gain_of(which: Side, x: Tensor, centroids: Tensor) -> float:
    """By how much centroids (1, C, width) of samples x (N, width) are to grow.

    Values grow until they are right on average. Scores pass through an exponential, which blows up what noise adds to them, so
    keys go a part of that way (SmolLM2 at 2 bits, mean KL: none 46, 0.65 of the way 33, all 35, half as much again 51).
    """
    decoded = pq.decode(pq.encode(x, centroids), centroids)
    unbiased = float((x * x).sum() / (x * decoded).sum())
    return round(unbiased ** (KEY_GAIN_POWER if which == "key" else 1.0), 4)


def _parts(x: Tensor, which: Side, width: int, page_size: int) -> Tensor:
    """One head's keys or values (N, d) cut into parts: (1, n, width) of normalised pages, or (M, N, width) as they are."""
    if not page_size:
        return x.float().unflatten(1, (-1, width)).transpose(0, 1)
    pages = normalising.rotate(x[: len(x) // page_size * page_size]).unflatten(0, (-1, page_size))
    return normalising.normalise(which, pages)[0].reshape(1, -1, width)


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
    normalise: bool = True,
    progress: bool = True,
    max_sample_bytes: int | None = None,
) -> Codebook:
    """Learn a codebook of a model's own, from text that its evaluation never sees. Caches do well without one.

    The text is cut into windows; a seeded choice of them goes through the model, each with fresh context, and the keys
    (after their rotary embedding) and values of every full-attention layer are sampled, those of as many layers at a
    time as host memory has room for (`LiveSamples`). The first `sink_tokens` of a window are left out: a cache keeps
    them exact, and their keys and values are like no others. One k-means runs over the normalised keys of all layers and
    heads, and one over values (`kmeans`), on the model's device. A text with fewer than `num_tokens` tokens is a warning.

    Args:
        model: a transformers causal language model, in any dtype, on any device.
        tokenizer: its tokenizer.
        texts: one text or several documents, which are joined by the tokenizer's end-of-text token; or token ids,
            int64 (N), for which no tokenizer is needed.
        config: shape of the codes, page_size and sink_tokens. None means PQConfig().
        num_tokens: how many tokens to sample; fewer if the text is shorter.
        window: tokens of one window; the model's training length is best. None means 2048, or what the model can hold.
        seed: of the choice of windows and of k-means.
        objective: "tail" or "plain", see `kmeans`.
        iterations: Lloyd steps.
        normalise: see `learn`.
        progress: show progress bars.
        max_sample_bytes: of the samples in memory at once, see `LiveSamples`.

    Raises:
        ValueError: the text has fewer tokens than a page, the window is longer than the model can hold, the model has
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
    options: dict[str, Any] = {"objective": objective, "iterations": iterations, "normalise": normalise}
    return learn(samples, config, seed=seed, device=device, progress=progress, **options)
