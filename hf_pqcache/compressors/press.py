"""What a press is: a function from a finished prompt to fewer keys and values; and what all that score tokens share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Press(Protocol):
    """Anything that compresses a prompt. kvpress' presses are such, too; nothing of kvpress is imported."""

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to keep of a whole prompt in one layer.

        Args:
            module: the layer's attention.
            hidden_states: (B, T, D), what went into it.
            keys, values: (B, H, T, d), keys after their rotary embedding.
            attentions: (B, Hq, T, T) weights where attention returns them.
            kwargs: what the module was called with; `position_embeddings` are (cos, sin) of (B or 1, T, d) each.

        Returns:
            (B, H, n, d) each, n from 0 to T: as many in every head, each head its own tokens.
        """
        ...


class ScorePress(ABC):
    """Keeps the tokens that score best, in each head others, in their order.

    Args:
        ratio: the share of the prompt that goes, from 0 to below 1; of T tokens int(T * (1 - ratio)) stay, one at least.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio}: the share of tokens that goes is from 0 to below 1")
        self.ratio = ratio

    def kept(self, count: int) -> int:
        """How many of `count` tokens stay."""
        return max(1, int(count * (1 - self.ratio)))

    @abstractmethod
    def scores(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """How much each token is worth, (B, H, T); arguments as in `Press.compress`."""

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """As in `Press.compress`."""
        count = keys.shape[2]
        kept = self.kept(count)
        if kept == count:
            return keys, values
        best = self.scores(module, hidden_states, keys, values, kwargs).topk(kept, dim=2).indices.sort(dim=2).values
        return keys.gather(2, _of(best, keys)), values.gather(2, _of(best, values))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ratio={self.ratio})"


def _of(best: Tensor, x: Tensor) -> Tensor:
    return best[..., None].expand(-1, -1, -1, x.shape[3])
