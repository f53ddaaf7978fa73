"""The cells of a grid by which kernels search centroids of two numbers: no list misses the nearest one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_pqcache.codebook import shipped
from hf_pqcache.codebook.cells import CELLS, MANY, REACH, cells
from hf_pqcache.config import PQConfig


def lists_at(lists: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """For points (n, 2): the four candidates of the cell of each (n, 4), and whether there are more."""
    x, y = ((points + REACH) * (CELLS / (2 * REACH))).floor().clamp(0, CELLS - 1).long().unbind(1)
    found = lists[y * CELLS + x].long() & 0xFFFFFFFF
    return found[:, None] >> torch.arange(0, 32, 8) & 255, found == MANY


def assert_none_is_missed(centroids: Tensor, points: Tensor) -> Tensor:
    """-> at which points all centroids are to be compared."""
    candidates, many = lists_at(cells(centroids), points)
    distance = (points[:, None] - centroids[0].double()).square().sum(-1)
    listed = distance.gather(1, candidates.clamp(max=centroids.shape[1] - 1)).amin(1)
    assert torch.equal(listed[~many], distance.amin(1)[~many])
    assert (candidates[~many].diff() >= 0).all(), "the lowest of equally near ones comes first"
    return many


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_shipped_centroids_have_four_candidates_wherever_numbers_are(bits: int) -> None:
    book = shipped.codebook(PQConfig(bits=bits), 64, 64)
    points = torch.rand(50_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for which in ("key", "value"):
        if book.side(which).shape[2] == 2:
            # What is coded is at most the gain, and 2 ** (1 / 16) of it where the scale was rounded down.
            assert not assert_none_is_missed(book.side(which), points * 1.045 * book.gain(which)).any()


@pytest.mark.parametrize("count", [32, 256])
@pytest.mark.parametrize("kind", ["uniform", "clustered", "equal", "far"])
def test_any_centroids(count: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(count)
    centroids = torch.rand(1, count, 2, generator=generator) * 2 - 1
    centroids = {"uniform": centroids, "clustered": centroids * 0.05, "equal": centroids * 0, "far": centroids * 40}[
        kind
    ].half()
    points = torch.randn(20_000, 2, dtype=torch.float64, generator=generator) * torch.tensor([0.5, 3.0])[:, None].repeat(
        10_000, 1
    )
    many = assert_none_is_missed(centroids, points)
    assert many.all() if kind == "equal" else not many.all()
