"""New tokens of a layer between its attention and its pages, where hooks may still replace a prompt's; knows no storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_pqcache.attention import padding
from hf_pqcache.config import Side


@dataclass
class Pending:
    """What a layer has been given and not stored yet.

    Attributes:
        keys, values: (B, H, n, d). As many as `positions` until they are replaced.
        positions: how many came.
        before: how many the layer held before they did; hooks may replace them only if there were none.
        seen_by: the attention module that has computed with them, if hooks of it may want them; None before, or else.
        mask, position_ids: what attention was given with them.
        counts_removed: see `Lengths`; who replaces says it.
    """

    keys: Tensor
    values: Tensor
    positions: int
    before: int = 0
    seen_by: nn.Module | None = None
    mask: Any = None
    position_ids: Tensor | None = None
    counts_removed: bool = False

    def side(self, which: Side) -> Tensor:
        return self.keys if which == "key" else self.values

    @property
    def removed(self) -> int:
        return self.positions - self.keys.shape[2]

    def replace(self, which: Side, tensor: Tensor) -> None:
        """Have other keys or values (B, H, n, d). Raises ValueError for other heads or more tokens, or a padded batch."""
        old = self.side(which)
        like = (*old.shape[:2], old.shape[3])
        if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != like or tensor.shape[2] > self.positions:
            wanted = f"({like[0]}, {like[1]}, 0 to {self.positions}, {like[2]})"
            raise ValueError(f"the {which}s of a pruned prompt must be {wanted}, all heads alike, not {tuple(tensor.shape)}")
        if tensor.shape[2] != self.positions and (why := padding.why_not_all_seen(self.mask, self.positions, len(tensor))):
            raise ValueError(
                f"a prompt can be pruned only if all its tokens are to be seen, and {why}: what is kept would lie under "
                "another token's mask. Pass prompts of one length, without padding, or one by one"
            )
        tensor = tensor.detach().to(old.dtype).contiguous()
        if which == "key":
            self.keys = tensor
        else:
            self.values = tensor

    def keep_first(self, which: Side, count: int) -> None:
        """Have the first `count` keys or values only, as if the others of them had never come."""
        if which == "key":
            self.keys = self.keys[:, :, :count]
        else:
            self.values = self.values[:, :, :count]

    def settle(self) -> None:
        """What comes behind other tokens is as many as is left of it. Raises ValueError if only one side is shorter."""
        self.check()
        if self.before and self.removed:
            self.positions = self.keys.shape[2]
            self.position_ids = None if self.position_ids is None else self.position_ids[..., : self.positions]

    def check(self) -> None:
        """Raises ValueError if only one side has been shortened."""
        if self.keys.shape[2] != self.values.shape[2]:
            counts = f"{self.keys.shape[2]} keys and {self.values.shape[2]} values"
            raise ValueError(f"a pruned prompt has {counts}: a hook that assigns layer.keys must assign layer.values, too")
