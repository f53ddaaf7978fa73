"""Which neighbouring tokens of a prompt become one: groups of text and of images apart; knows no network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """A prompt's tokens, by their positions (int64), each in exactly one of the three.

    Attributes:
        stay: (s,), those that stay as they are.
        text, images: (g, factor), groups that become one token each.
    """

    stay: Tensor
    text: Tensor
    images: Tensor

    @property
    def kept(self) -> int:
        """How many tokens are left."""
        return self.stay.numel() + len(self.text) + len(self.images)

    @property
    def order(self) -> Tensor:
        """(kept,) what sorts (stay, text, images) by where their tokens were."""
        return torch.cat([self.stay, self.text[:, 0], self.images[:, 0]]).argsort()


def groups_of(is_image: Tensor, factor: int, sinks: int, recent: int, merges_images: bool) -> Groups:
    """Groups of `factor` neighbours of one kind, none across the edge of an image.

    The first `sinks` and last `recent` tokens stay, and of each run of text or image what fills no group; all of an image
    where `merges_images` is false.

    Args:
        is_image: bool (T), on the host: which tokens are of images.
    """
    count = is_image.numel()
    first, last = min(sinks, count), max(count - recent, min(sinks, count))
    part = is_image[first:last]
    begins = torch.ones_like(part)
    begins[1:] = part[1:] != part[:-1]
    run = begins.cumsum(0) - 1  # the number of each token's run
    lengths = torch.bincount(run, minlength=1)
    place = torch.arange(part.numel()) - (lengths.cumsum(0) - lengths)[run]
    is_grouped = place < (lengths // factor * factor)[run]
    if not merges_images:
        is_grouped &= ~part
    positions = torch.arange(first, last)
    stays = torch.ones(count, dtype=torch.bool)
    stays[first:last] = ~is_grouped
    text, images = (positions[is_grouped & kind].view(-1, factor) for kind in (~part, part))
    return Groups(stays.nonzero()[:, 0], text, images)
