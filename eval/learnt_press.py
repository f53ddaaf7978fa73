"""A learnt press of a model: trained on text, or images with text, and compared with others on what it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.compressors.mlp import MLPCompressor
from hf_pqcache.compressors.parse import PRESSES
from hf_pqcache.compressors.training import Sample, Training, divergence, train
from hf_pqcache.eval.session.caches import head_dim_of
from hf_pqcache.models import images
from hf_pqcache.models.support import full_attention

#: The last share of a text, which nothing is trained on.
HELD_OUT = 0.1
#: Windows of it.
WINDOWS = 16


def learn(
    model: Any,
    data: Tensor | Sequence[Sample],
    training: Training,
    *,
    factor: int,
    sinks: int,
    recent: int,
    steps: int,
    folder: Path,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[list[float], dict[str, float]]:
    """Train up to `steps` -> (loss of every step, what each press loses on the held-out end of the data).

    Both in nats a token, see `divergence`. The presses keep as many tokens of a prompt as the learnt one, "mean" is what it
    began as.

    Args:
        data: text, int64 (N), or samples; the press has networks for images if one of these has any.

    Raises ValueError where there is too little of them, or heads of layers differ in size.
    """
    head_dim = head_dim_of(model.config)
    if not head_dim:
        raise ValueError("the model's layers have heads of different sizes, which one kind of network cannot serve")
    from transformers import DynamicCache

    layers: list[Any] = DynamicCache(config=model.config).layers
    if not full_attention(model.config, layers):
        raise ValueError("the model has no full-attention layer, whose tokens could be compressed")
    sees = not isinstance(data, Tensor) and any(sample.pixels is not None for sample in data)
    made: dict[str, Any] = {"factor": factor, "sinks": sinks, "recent": recent, "images": sees}
    torch.manual_seed(training.seed)
    press = MLPCompressor(len(layers), head_dim, head_dim, **made)
    learnt_from, held_out = _cut(data, training)
    for sample in held_out[:1] if isinstance(data, Tensor) else [*learnt_from, *held_out]:
        if press.groups(_images_of(model, sample)).kept == sample.prompt:
            raise ValueError(f"a prompt of {sample.prompt} tokens has no group of {factor} beside what stays: use a longer one")
    losses = train(model, press, learnt_from, training, steps=steps, folder=folder, show=show)
    presses: dict[str, Any] = {"learnt": press, "mean": MLPCompressor(len(layers), head_dim, head_dim, **made)}
    lost = {name: _lost(model, partial(_same, one), held_out) for name, one in presses.items()}

    def as_many(kind: Any) -> Callable[[Sample], Any]:
        """A press that keeps as many tokens of a sample as the learnt one."""
        return lambda sample: kind(1 - (press.groups(_images_of(model, sample)).kept + 0.5) / sample.prompt)

    return losses, lost | {name: _lost(model, as_many(kind), held_out) for name, kind in PRESSES.items()}


def _cut(data: Tensor | Sequence[Sample], training: Training) -> tuple[Any, list[Sample]]:
    """(what to learn from, samples that nothing is learnt from)."""
    if not isinstance(data, Tensor):
        if len(data) < 2:
            raise ValueError(f"there are {len(data)} samples: one to learn from and one that is held out are needed at least")
        cut = min(len(data) - 1, round(len(data) * (1 - HELD_OUT)))
        return data[:cut], list(data[cut:])
    cut = int(data.numel() * (1 - HELD_OUT))
    if data.numel() - cut < training.prompt + training.answer:
        raise ValueError(
            f"the text has {data.numel()} tokens: a tenth of it must hold a window of {training.prompt + training.answer}"
        )
    steps = range(-(-WINDOWS // training.batch))
    return data[:cut], [sample for step in steps for sample in training.draw(data[cut:], step)]


def _images_of(model: Any, sample: Sample) -> Tensor:
    """bool (prompt): which tokens of a sample's prompt, that of its first row, are of images."""
    ids = sample.ids[:1, : sample.prompt]
    found: Tensor = images.told(model.config, ids).get(images.IMAGE_TOKENS, torch.zeros(ids.shape, dtype=torch.bool))[0]
    return found


def _same(press: Any, sample: Sample) -> Any:
    return press


@torch.no_grad()
def _lost(model: Any, press_for: Callable[[Sample], Any], samples: Sequence[Sample]) -> float:
    found = [float(divergence(model, press_for(sample), sample)) for sample in samples]
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
