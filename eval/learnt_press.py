"""A learnt press of a model: trained on a text, and compared with presses that prune as much on what it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.compressors.mlp import MLPCompressor
from hf_pqcache.compressors.parse import PRESSES
from hf_pqcache.compressors.training import Training, divergence, train
from hf_pqcache.eval.session.caches import head_dim_of
from hf_pqcache.models.support import full_attention

#: The last share of a text, which nothing is trained on.
HELD_OUT = 0.1
#: Windows of it.
WINDOWS = 16


def learn(
    model: Any,
    ids: Tensor,
    training: Training,
    *,
    factor: int,
    sinks: int,
    recent: int,
    steps: int,
    folder: Path,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[list[float], dict[str, float]]:
    """Train up to `steps` -> (loss of every step, what each press loses on the held-out end of the text).

    Both in nats a token, see `divergence`. The presses keep as many tokens of a prompt as the learnt one, "mean" is what it
    began as.

    Raises ValueError where a text is too short, or heads of layers differ in size.
    """
    head_dim = head_dim_of(model.config)
    if not head_dim:
        raise ValueError("the model's layers have heads of different sizes, which one kind of network cannot serve")
    from transformers import DynamicCache

    layers: list[Any] = DynamicCache(config=model.config).layers
    if not full_attention(model.config, layers):
        raise ValueError("the model has no full-attention layer, whose tokens could be compressed")
    made: dict[str, int] = {"factor": factor, "sinks": sinks, "recent": recent}
    if not MLPCompressor(0, head_dim, head_dim, **made).groups(training.prompt):
        raise ValueError(f"a prompt of {training.prompt} tokens has no group of {factor} beside what stays: use a longer one")
    cut = int(ids.numel() * (1 - HELD_OUT))
    windows = (
        [training.windows(ids[cut:], step) for step in range(-(-WINDOWS // training.batch))]
        if _fits(ids[cut:], training)
        else []
    )
    if not windows:
        raise ValueError(
            f"the text has {ids.numel()} tokens: a tenth of it must hold a window of {training.prompt + training.answer}"
        )
    torch.manual_seed(training.seed)
    press = MLPCompressor(len(layers), head_dim, head_dim, **made)
    losses = train(model, press, ids[:cut], training, steps=steps, folder=folder, show=show)
    kept = training.prompt - press.groups(training.prompt) * (factor - 1)
    ratio = 1 - (kept + 0.5) / training.prompt
    others: dict[str, Any] = {"learnt": press, "mean": MLPCompressor(len(layers), head_dim, head_dim, **made)}
    others |= {name: kind(ratio) for name, kind in PRESSES.items()}
    return losses, {name: _lost(model, other, windows, training.prompt) for name, other in others.items()}


def _fits(ids: Tensor, training: Training) -> bool:
    return ids.numel() >= training.prompt + training.answer


@torch.no_grad()
def _lost(model: Any, press: Any, windows: Sequence[Tensor], prompt: int) -> float:
    device = next(model.parameters()).device
    found = [float(divergence(model, press, part.to(device), prompt)) for part in windows]
    return sum(found) / len(found)


def loss_curve(losses: Sequence[float], held_out: dict[str, float]) -> bytes:
    """A PNG: the loss of every step, its running mean, and what each press loses on held-out text."""
    from matplotlib.figure import Figure

    from hf_pqcache.eval.report.plots import LIGHT, png

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color=LIGHT["grid"], linewidth=1)
    span = max(1, len(losses) // 30)
    means = [sum(losses[max(0, i - span) : i + 1]) / len(losses[max(0, i - span) : i + 1]) for i in range(len(losses))]
    axes.plot(range(1, len(losses) + 1), means, color=LIGHT["series-1"], label=f"training, mean of {span} steps")
    for i, (name, value) in enumerate(held_out.items()):
        axes.axhline(value, color=LIGHT[f"series-{i % 7 + 1}"], linestyle="--", linewidth=1, label=f"{name}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return png(figure, "Divergence behind a compressed prompt", "learnt press, model frozen")
