"""Trains a learnt press with the model frozen: behind a compressed prompt it shall say what it says behind the whole one.

Fastcache's loss is soft cross-entropy, Jensen-Shannon divergence, L1 and distances of hidden states together; here it is the
first alone, less the entropy of what is wanted, so that zero means that nothing is lost. A run is a function of its settings
and step numbers, so one that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache.compressors.mlp import MLPCompressor
from hf_pqcache.models import images
from hf_pqcache.models.names import NAMES, cache_kwargs
from hf_pqcache.models.support import full_attention

STATE, PROGRESS = "training.safetensors", "training.json"


class Sample(NamedTuple):
    """A prompt to compress and what follows it.

    Attributes:
        ids: int64 (B, n). prompt: how many of these are compressed.
        pixels: (images, ...) of the prompt, as a model's processor makes them; None without.
    """

    ids: Tensor
    prompt: int
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """Settings of a run.

    Attributes:
        prompt, answer: tokens of a window that are compressed, and that are predicted behind them.
        batch: windows, or samples, a step. rate: of Adam. seed: of the windows that are drawn.
    """

    prompt: int = 384
    answer: int = 128
    batch: int = 2
    rate: float = 5e-4
    seed: int = 0

    def draw(self, data: Tensor | Sequence[Sample], step: int) -> list[Sample]:
        """What a step learns from: windows of a text, int64 (N), or `batch` of some samples."""
        if isinstance(data, Tensor):
            return [Sample(self.windows(data, step), self.prompt)]
        chosen = torch.randint(0, len(data), (self.batch,), generator=self._random(step)).tolist()
        return [data[i] for i in chosen]

    def _random(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def windows(self, ids: Tensor, step: int) -> Tensor:
        """Token ids (batch, prompt + answer) of a step, from ids (N)."""
        length = self.prompt + self.answer
        begins = torch.randint(0, ids.numel() - length + 1, (self.batch,), generator=self._random(step)).tolist()
        return torch.stack([ids[begin : begin + length] for begin in begins])


def train(
    model: Any,
    compressor: MLPCompressor,
    data: Tensor | Sequence[Sample],
    settings: Training,
    *,
    steps: int,
    folder: Path,
    save_every: int = 50,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train up to step `steps`, from where `folder` stands -> the loss of every step, earlier ones included.

    The loss is the Kullback-Leibler divergence, in nats a token, from the model's predictions behind the exact prompt.

    Args:
        model: in eval mode; its weights do not change.
        data: text, int64 (N), or samples, in which there may be images.

    Raises ValueError for a text shorter than a window, or a folder with a run of other settings.
    """
    if isinstance(data, Tensor) and (ids := data).numel() < settings.prompt + settings.answer:
        raise ValueError(f"the text has {ids.numel()} tokens, a window takes {settings.prompt + settings.answer}")
    device = next(model.parameters()).device
    compressor.to(device)
    optimizer = torch.optim.Adam(compressor.parameters(), lr=settings.rate)
    losses = _resume(compressor, optimizer, settings, folder)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        for step in range(len(losses), steps):
            optimizer.zero_grad()
            drawn = settings.draw(data, step)
            loss = torch.stack([divergence(model, compressor, sample) for sample in drawn]).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            show(step, losses[-1])
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _save(compressor, optimizer, settings, losses, folder)
    finally:
        for parameter, was_wanted in wanted:
            parameter.requires_grad_(was_wanted)
    return losses


def divergence(model: Any, press: Any, sample: Sample) -> Tensor:
    """KL divergence (nats a token) of what `model` predicts behind compressed prompts from what it does behind exact ones.

    Differentiable in the press's parameters.
    """
    device = next(model.parameters()).device
    ids, prompt = sample.ids.to(device), sample.prompt
    looks = {} if sample.pixels is None else {"pixel_values": sample.pixels.to(device, model.dtype)}
    exact, pruned = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad(), _shown(model) as seen:
        model(ids[:, :prompt], **looks, **cache_kwargs(exact, model), use_cache=True)
    layers: list[Any] = exact.layers
    kept_whole = set(range(len(layers))) - set(full_attention(model.config, layers))
    told = images.told(model.config, ids[:, :prompt])
    for layer, (module, hidden, kwargs) in seen.items():
        sides = layers[layer].keys, layers[layer].values
        sides = sides if layer in kept_whole else press.compress(module, hidden, *sides, None, kwargs | told)
        pruned.update(*sides, layer)
    places = torch.arange(prompt, ids.shape[1], device=device)[None].expand(len(ids), -1)
    with torch.no_grad():
        wanted = model(ids[:, prompt:], position_ids=places, **cache_kwargs(exact, model)).logits
    found = model(ids[:, prompt:], position_ids=places, **cache_kwargs(pruned, model)).logits
    said, meant = (x.float().log_softmax(-1).flatten(0, 1) for x in (found, wanted))
    return F.kl_div(said, meant, log_target=True, reduction="batchmean")


@contextmanager
def _shown(model: Any) -> Iterator[dict[int, tuple[Any, Tensor, dict[str, Any]]]]:
    """What goes into each attention module within it, by layer: (module, hidden states, the other arguments)."""
    seen: dict[int, tuple[Any, Tensor, dict[str, Any]]] = {}

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told = {name: value for name, value in kwargs.items() if name not in NAMES}
        seen[module.layer_idx] = module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], told

    modules = [part for part in model.modules() if isinstance(getattr(part, "layer_idx", None), int)]
    handles = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in modules]
    try:
        yield seen  # an attention module comes after the decoder layer around it
    finally:
        for handle in handles:
            handle.remove()


def _save(
    compressor: MLPCompressor, optimizer: torch.optim.Optimizer, settings: Training, losses: list[float], folder: Path
) -> None:
    compressor.save_pretrained(folder)
    states = optimizer.state_dict()["state"]
    save_file({f"{i}.{name}": x.cpu() for i, state in states.items() for name, x in state.items()}, folder / STATE)
    (folder / PROGRESS).write_text(json.dumps({"settings": asdict(settings), "losses": losses}) + "\n")


def _resume(compressor: MLPCompressor, optimizer: torch.optim.Optimizer, settings: Training, folder: Path) -> list[float]:
    """Be where the run in `folder` was saved last -> its losses; none if there is no run."""
    if not (folder / PROGRESS).is_file():
        return []
    noted = json.loads((folder / PROGRESS).read_text())
    before = MLPCompressor.from_pretrained(folder)
    if noted["settings"] != asdict(settings) or before.settings != compressor.settings:
        raise ValueError(f"{folder} has a run of {noted['settings']} and {before.settings}: give these, or another folder")
    compressor.load_state_dict(before.state_dict())
    states: dict[int, dict[str, Tensor]] = {}
    for name, x in load_file(folder / STATE).items():
        number, _, what = name.partition(".")
        states.setdefault(int(number), {})[what] = x
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    losses: list[float] = noted["losses"]
    return losses
