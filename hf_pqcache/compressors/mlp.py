"""A learnt press: each group of neighbouring tokens becomes one. After Fastcache (Zhu et al., "FastCache: Optimizing
Multimodal LLM Serving through Lightweight KV-Cache Compression Framework", 2025, arXiv:2503.08461), for text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_pqcache.compressors import queries

WEIGHTS, SETTINGS = "compressor.safetensors", "compressor.json"


class _Merger(nn.Module):
    """`factor` neighbouring vectors of a head -> one: their mean, and what a small network adds to it."""

    def __init__(self, factor: int, size: int) -> None:
        super().__init__()
        last = nn.Linear(size, size)
        nn.init.zeros_(last.weight)  # it begins as the mean
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(factor * size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., factor, d) -> (..., d)."""
        merged: Tensor = x.mean(dim=-2) + self.layers(x.flatten(-2))
        return merged


class MLPCompressor(nn.Module):
    """A press that merges groups of tokens. The first `sinks` and newest `recent` tokens stay, and what fills no group.

    Keys are turned back to the middle of their group before they are merged, and the merged one forth, so that the same
    network serves all positions.

    Args:
        layers: of the model. key_dim, value_dim: numbers of a key and of a value of one head; all heads share a network.
        factor: tokens of a group.
    """

    def __init__(self, layers: int, key_dim: int, value_dim: int, *, factor: int = 4, sinks: int = 4, recent: int = 64) -> None:
        super().__init__()
        if factor < 2 or sinks < 0 or recent < 0:
            raise ValueError(f"factor={factor}, sinks={sinks}, recent={recent}: use 2 or more, and no negative numbers")
        self.settings = {
            "layers": layers,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "factor": factor,
            "sinks": sinks,
            "recent": recent,
        }
        self.factor, self.sinks, self.recent = factor, sinks, recent
        self.keys = nn.ModuleList(_Merger(factor, key_dim) for _ in range(layers))
        self.values = nn.ModuleList(_Merger(factor, value_dim) for _ in range(layers))

    @property
    def ratio(self) -> float:
        """The share of tokens that goes, of a long prompt."""
        return 1 - 1 / self.factor

    def groups(self, count: int) -> int:
        """How many groups a prompt of `count` tokens has; each becomes one token."""
        return max(0, count - self.sinks - self.recent) // self.factor

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """As in `Press.compress`; differentiable."""
        layer: Any = module.layer_idx
        first, count = self.sinks, keys.shape[2]
        groups = self.groups(count)
        last = first + groups * self.factor
        if not groups:
            return keys, values
        self.to(keys.device)
        turns = kwargs.get("position_embeddings")
        middles = None
        if turns is not None:
            of_middles = torch.arange(first, last, device=keys.device).view(groups, self.factor)[:, self.factor // 2]
            middles = turns[0][:, of_middles], turns[1][:, of_middles]
        return (
            self._merged(self.keys[layer], module, keys, first, last, middles),
            self._merged(self.values[layer], module, values, first, last, None),
        )

    def _merged(
        self, merge: nn.Module, module: nn.Module, x: Tensor, first: int, last: int, middles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        part = x[:, :, first:last]
        if middles is not None:
            cos, sin = (m.repeat_interleave(self.factor, dim=1) for m in middles)
            part = queries.rotate(module, part, cos, -sin)
        merged: Tensor = merge(part.float().unflatten(2, (-1, self.factor))).to(x.dtype)
        if middles is not None:
            merged = queries.rotate(module, merged, *middles)
        return torch.cat([x[:, :, :first], merged, x[:, :, last:]], dim=2)

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights as safetensors, settings as JSON."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, Path(folder, WEIGHTS))
        Path(folder, SETTINGS).write_text(json.dumps(self.settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MLPCompressor:
        """What `save_pretrained` wrote. Raises FileNotFoundError, ValueError if the two files do not fit each other."""
        for name in (WEIGHTS, SETTINGS):
            if not Path(folder, name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: expected a folder that `pqcache train-compressor` made")
        try:
            found = cls(**json.loads(Path(folder, SETTINGS).read_text()))
            found.load_state_dict(load_file(Path(folder, WEIGHTS)))
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{folder}: {WEIGHTS} and {SETTINGS} do not fit each other: {error}") from None
        return found
