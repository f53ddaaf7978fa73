"""Batched k-means, plain or tail-aware; knows no cache, no model.

Lloyd's algorithm (Lloyd 1982) over P independent problems at once, from a k-means++ start (Arthur, Vassilvitskii 2007).
Plain k-means minimises the mean squared error: it serves the typical sample and clips the rare one, and rare keys are
those that far-away queries look up. The tail-aware objective minimises the mean fourth power of the error instead, by
weighting every sample with its squared error of the step before (iteratively re-weighted least squares).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["tail", "plain"]
#: A sample's weight is its squared error to this power: the mean of error**(2 + 2 * power) is minimised.
_WEIGHT_POWER = {"tail": 1.0, "plain": 0.0}

#: Distances held at once: 8 MiB on a CPU, so that they stay in its caches; 128 MiB on a GPU.
_CHUNK_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 25}
#: Samples of one problem that the k-means++ start chooses from, for every centroid.
_START_SAMPLES = 8
#: Share of the way to the weighted mean that a tail-aware step goes. Re-weighting for the 4th power overshoots
#: (Newton's step is 1/3 to 1 of it): 0.7 gave 5 % less error than 1.0 and than 0.5 after the same number of steps.
_TAIL_STEP = 0.7


def kmeans(
    samples: Tensor,
    num_centroids: int,
    *,
    objective: Objective = "tail",
    iterations: int = 25,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """samples (P, N, s) float -> centroids (P, C, s) float32, P independent k-means problems on the samples' device.

    The result depends on samples and seed only, not on how the problems are cut into chunks; a problem's random numbers
    depend on its place among the P. A centroid that no sample chooses moves to one of the worst-served samples.

    Args:
        samples: any float dtype; memory beyond them is bounded by working on a few problems at a time.
        num_centroids: C, 1 to 256.
        objective: "tail" (mean 4th power of the error) or "plain" (mean squared error).
        iterations: Lloyd steps.
        seed: of the start.
        progress: called with the number of problems finished since the last call.

    Raises:
        ValueError: fewer samples than centroids, non-finite samples, an unknown objective, a wrong shape.
    """
    if samples.dim() != 3 or not samples.is_floating_point():
        raise ValueError(f"samples must be float (P, N, s), got {samples.dtype} {tuple(samples.shape)}")
    if objective not in _WEIGHT_POWER:
        raise ValueError(f"objective={objective!r} is unknown; use one of {sorted(_WEIGHT_POWER)}")
    if not 1 <= num_centroids <= 256:
        raise ValueError(f"num_centroids={num_centroids} is out of range; use 1 to 256")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    num_problems, num_samples, width = samples.shape
    if num_samples < num_centroids:
        raise ValueError(
            f"{num_samples} samples are fewer than num_centroids={num_centroids}; "
            f"give at least {num_centroids} (better {4 * num_centroids}) samples, or use fewer bits a code"
        )
    centroids = torch.empty(num_problems, num_centroids, width, dtype=torch.float32, device=samples.device)
    limit = _CHUNK_NUMBERS.get(samples.device.type, 1 << 24)
    step = max(1, limit // (num_centroids * min(num_samples, 512)))
    for start in range(0, num_problems, step):
        stop = min(start + step, num_problems)
        part = samples[start:stop].float().contiguous()
        centroids[start:stop] = _solve(
            part, num_centroids, _WEIGHT_POWER[objective], iterations, seed, range(start, stop), limit
        )
        if progress is not None:
            progress(stop - start)
    return centroids


def _solve(
    samples: Tensor, num_centroids: int, power: float, iterations: int, seed: int, problems: range, limit: int
) -> Tensor:
    """k-means of the problems whose places are in `problems`: samples (p, N, s) float32 -> centroids (p, C, s)."""
    if not samples.isfinite().all():
        raise ValueError("samples contain NaN or infinity: look for an overflow in the model's float16 activations")
    # Centred and scaled, so that |x|^2 - 2 x.c + |c|^2 loses little to cancellation whatever the units are.
    mean = samples.mean(1, keepdim=True)
    scale = (samples - mean).square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-20)
    samples = (samples - mean) / scale
    centroids = _start(samples, num_centroids, 1 + power, seed, problems)
    stride = max(1, min(4, samples.shape[1] // (_START_SAMPLES * num_centroids)))
    settle = -(-iterations // 5)
    for i in range(iterations):
        # Early steps see a quarter of the samples each, in turn: four times faster, and the jitter leaves poor local
        # minima. The last fifth of the steps sees all of them.
        is_partial = stride > 1 and i < iterations - settle
        part = samples[:, i % stride :: stride].contiguous() if is_partial else samples
        nearest, error = _assign(part, centroids, limit)
        # A floor under the weights keeps a cluster whose samples all lie on their centroid from vanishing.
        weights = (error + 1e-6 * error.mean(1, keepdim=True) + 1e-30) ** power
        sums = _cluster_sums(torch.cat([part * weights[..., None], weights[..., None]], -1), nearest, num_centroids)
        totals = sums[..., -1:]
        means = (sums[..., :-1] / totals.clamp_min(1e-37)).float()
        moved = torch.where(totals > 0, torch.lerp(centroids, means, _TAIL_STEP if power else 1.0), centroids)
        centroids = moved if is_partial else _reseed_empty(moved, totals[..., 0] == 0, part, error)
    return centroids * scale + mean


def _start(samples: Tensor, num_centroids: int, power: float, seed: int, problems: range) -> Tensor:
    """k-means++: samples (p, N, s) -> centroids (p, C, s), drawn with odds error**(2 * power) from some of them."""
    num_problems, num_samples, width = samples.shape
    uniform = torch.empty(num_problems, num_centroids, dtype=torch.float64)
    picked = torch.empty(num_problems, min(num_samples, _START_SAMPLES * num_centroids), dtype=torch.int64)
    for i, problem in enumerate(problems):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + problem) % (1 << 63))
        uniform[i] = torch.rand(num_centroids, dtype=torch.float64, generator=generator)
        picked[i] = torch.randperm(num_samples, generator=generator)[: picked.shape[1]]
    uniform, picked = uniform.to(samples.device), picked.to(samples.device)
    pool = samples.gather(1, picked[..., None].expand(-1, -1, width))
    parts = [part.contiguous() for part in pool.unbind(-1)]  # a pass a number is faster than a reduction over s
    row = torch.arange(num_problems, device=samples.device)
    choice = torch.zeros(num_problems, dtype=torch.int64, device=samples.device)
    centroids = pool.new_empty(num_problems, num_centroids, width)
    error = torch.full_like(parts[0], float("inf"))
    for i in range(num_centroids):
        centroids[:, i] = pool[row, choice]
        distance = torch.zeros_like(error)
        for part in parts:
            distance += (part - part[row, choice][:, None]).square_()
        torch.minimum(error, distance, out=error)
        odds = (error**power).cumsum(1, dtype=torch.float64)
        target = uniform[:, (i + 1) % num_centroids, None] * odds[:, -1:]
        choice = torch.searchsorted(odds, target, right=True)[:, 0].clamp_(max=pool.shape[1] - 1)
    return centroids


def _assign(samples: Tensor, centroids: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """samples (p, N, s), centroids (p, C, s) -> nearest (p, N) int64 and its squared distance (p, N) float32."""
    num_problems, num_samples, width = samples.shape
    num_centroids = centroids.shape[1]
    # One matrix product with the sample's own square as a further number gives the whole squared distance.
    left = torch.cat([samples, samples.square().sum(-1, keepdim=True)], -1)
    right = torch.cat([-2 * centroids, centroids.new_ones(num_problems, num_centroids, 1)], -1).transpose(1, 2)
    bias = centroids.square().sum(-1)[:, None]
    nearest = torch.empty(num_problems, num_samples, dtype=torch.int64, device=samples.device)
    index = torch.arange(num_centroids, dtype=torch.int32, device=samples.device)
    step = max(1, limit // (num_problems * num_centroids))
    # One buffer for all chunks: fresh memory would cost more in page faults than the arithmetic.
    buffer = centroids.new_empty(num_problems * min(step, num_samples) * num_centroids)
    for start in range(0, num_samples, step):
        count = min(step, num_samples - start)
        distance = buffer[: num_problems * count * num_centroids].view(num_problems, count, num_centroids)
        torch.baddbmm(bias, left[:, start : start + step], right, out=distance)
        if samples.device.type == "cpu":
            # torch's argmin is scalar code on CPU. Bits of positive floats sort like integers, so the index can ride in
            # the lowest eight of them through amin, which is vectorized: 0.2 instead of 0.6 ns a distance in all,
            # exact to a relative 2**-15.
            packed = distance.view(torch.int32).bitwise_and_(-256).bitwise_or_(index).amin(-1)
            nearest[:, start : start + step] = packed.bitwise_and_(255)
        else:
            nearest[:, start : start + step] = distance.argmin(-1)
    chosen = centroids.gather(1, nearest[..., None].expand(-1, -1, width))
    return nearest, (samples - chosen).square_().sum(-1)


def _cluster_sums(terms: Tensor, nearest: Tensor, num_centroids: int) -> Tensor:
    """terms (p, N, k) float32, nearest (p, N) int64 -> (p, C, k) float64, the sum of every cluster, deterministic."""
    num_problems, _, num_terms = terms.shape
    if terms.device.type == "cpu":
        place = nearest + num_centroids * torch.arange(num_problems)[:, None]
        flat, size = place.flatten(), num_problems * num_centroids
        sums = [torch.bincount(flat, terms[..., i].flatten().double(), size) for i in range(num_terms)]
        return torch.stack(sums, -1).view(num_problems, num_centroids, num_terms)
    # Atomic adds would make the order of summation, and so the result, differ from run to run.
    order = nearest.to(torch.uint8).argsort(dim=1, stable=True)
    running = terms.gather(1, order[..., None].expand(-1, -1, num_terms)).double().cumsum(1)
    running = torch.cat([running.new_zeros(num_problems, 1, num_terms), running], 1)
    bounds = torch.arange(num_centroids + 1, device=terms.device).expand(num_problems, -1).contiguous()
    edges = torch.searchsorted(nearest.gather(1, order), bounds)[..., None].expand(-1, -1, num_terms)
    return running.gather(1, edges).diff(dim=1)


def _reseed_empty(centroids: Tensor, is_empty: Tensor, samples: Tensor, error: Tensor) -> Tensor:
    """Move centroid c with is_empty (p, C) to samples with the largest error (p, N), a different one each."""
    most = int(is_empty.sum(1).max())
    if most == 0:
        return centroids
    worst = error.topk(most, dim=1).indices
    rank = (is_empty.cumsum(1) - 1).clamp_min(0).clamp_max(most - 1)
    chosen = worst.gather(1, rank)[..., None].expand(-1, -1, samples.shape[-1])
    return torch.where(is_empty[..., None], samples.gather(1, chosen), centroids)
