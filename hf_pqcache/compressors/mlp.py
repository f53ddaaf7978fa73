"""A learnt press: each group of neighbouring tokens becomes one, by networks for text and for images. After Fastcache (Zhu
et al., "FastCache: Optimizing Multimodal LLM Serving through Lightweight KV-Cache Compression Framework", 2025,
arXiv:2503.08461), whose networks replace a group and have dropout; here they add to its mean. There an image comes first and
all tokens are merged as they lie; here images may be anywhere, keys are merged as of one position, and some tokens stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_pqcache.compressors import queries
from hf_pqcache.compressors.groups import Groups, groups_of
from hf_pqcache.models.images import IMAGE_TOKENS

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
    network serves all positions. No group holds tokens of an image beside others.

    Args:
        layers: of the model. key_dim, value_dim: numbers of a key and of a value of one head; all heads share a network.
        factor: tokens of a group.
        images: whether there are networks for the tokens of images, too. If not, these stay as they are.
    """

    def __init__(
        self,
        layers: int,
        key_dim: int,
        value_dim: int,
        *,
        factor: int = 4,
        sinks: int = 4,
        recent: int = 64,
        images: bool = False,
    ) -> None:
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
            "images": images,
        }
        self.factor, self.sinks, self.recent, self.merges_images = factor, sinks, recent, images
        self.keys = nn.ModuleList(_Merger(factor, key_dim) for _ in range(layers))
        self.values = nn.ModuleList(_Merger(factor, value_dim) for _ in range(layers))
        self.image_keys = nn.ModuleList(_Merger(factor, key_dim) for _ in range(layers if images else 0))
        self.image_values = nn.ModuleList(_Merger(factor, value_dim) for _ in range(layers if images else 0))

    @property
    def ratio(self) -> float:
        """The share of tokens that goes, of a long prompt."""
        return 1 - 1 / self.factor

    def groups(self, is_image: Tensor) -> Groups:
        """What becomes of a prompt, of which is_image, bool (T), says which tokens are of images."""
        return groups_of(is_image.cpu(), self.factor, self.sinks, self.recent, self.merges_images)

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """As in `Press.compress`; differentiable. Raises ValueError where rows of a batch would keep different numbers."""
        of_rows = self._groups_of_rows(keys, kwargs)
        turns = kwargs.get("position_embeddings")
        self.to(keys.device)
        if len(of_rows) == 1:
            return self._merged(module, keys, values, turns, of_rows[0])
        if len(kept := {groups.kept for groups in of_rows}) > 1:
            raise ValueError(
                f"the prompts of a batch have images in other places, and would keep {sorted(kept)} tokens: pages hold as "
                "many of all rows, so pass them one by one"
            )
        found = []
        for row, groups in enumerate(of_rows):
            own = None if turns is None else tuple(x[row : row + 1] if len(x) > 1 else x for x in turns)
            found.append(self._merged(module, keys[row : row + 1], values[row : row + 1], own, groups))
        return torch.cat([sides[0] for sides in found]), torch.cat([sides[1] for sides in found])

    def _groups_of_rows(self, keys: Tensor, kwargs: dict[str, Any]) -> list[Groups]:
        """The groups of each row, or of all of them."""
        is_image = kwargs.get(IMAGE_TOKENS, False)
        if is_image is None:
            raise ValueError("the prompt came as embeddings, which do not tell what of it is an image: pass input_ids")
        if is_image is False:
            is_image = torch.zeros(1, keys.shape[2], dtype=torch.bool)
        first = is_image[:1]
        return [self.groups(row) for row in (first if torch.equal(is_image, first.expand_as(is_image)) else is_image)]

    def _merged(self, module: nn.Module, keys: Tensor, values: Tensor, turns: Any, groups: Groups) -> tuple[Tensor, Tensor]:
        layer: Any = module.layer_idx
        order = groups.order.to(keys.device)
        new_keys, new_values = [keys[:, :, groups.stay]], [values[:, :, groups.stay]]
        for positions, of_keys, of_values in (
            (groups.text, self.keys, self.values),
            (groups.images, self.image_keys, self.image_values),
        ):
            if len(positions):
                new_keys.append(self._merge(of_keys[layer], module, keys, positions, turns))
                new_values.append(self._merge(of_values[layer], module, values, positions, None))
        return torch.cat(new_keys, dim=2)[:, :, order], torch.cat(new_values, dim=2)[:, :, order]

    def _merge(self, merge: nn.Module, module: nn.Module, x: Tensor, positions: Tensor, turns: Any) -> Tensor:
        """x (B, H, T, d) -> (B, H, g, d), a token for each group of positions (g, factor)."""
        part = x[:, :, positions.flatten().to(x.device)]
        if turns is not None:
            if turns[0].dim() != 3:
                raise ValueError(f"{type(module).__name__} gives tokens positions in several dimensions (M-RoPE)")
            middles = [turn[:, positions[:, self.factor // 2].to(turn.device)] for turn in turns]
            cos, sin = (m.repeat_interleave(self.factor, dim=1) for m in middles)
            part = queries.rotate(module, part, cos, -sin)
        merged: Tensor = merge(part.float().unflatten(2, (-1, self.factor))).to(x.dtype)
        return merged if turns is None else queries.rotate(module, merged, *middles)

    def __repr__(self) -> str:
        images = "" if self.merges_images else ", tokens of images stay"
        return f"{type(self).__name__}(factor={self.factor}, sinks={self.sinks}, recent={self.recent}{images})"

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
