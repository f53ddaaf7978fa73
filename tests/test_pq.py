"""encode is nearest, by one set of centroids or one for each subspace, and decode inverts it on centroids."""

from __future__ import annotations

import pytest
import torch

from hf_pqcache.codebook import pq


def centroids(sets: int, count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sets, count, width, generator=generator).half()


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(("subspaces", "width", "bits"), [(8, 8, 4), (16, 2, 8), (32, 1, 5), (16, 4, 6)])
def test_encode_finds_the_nearest_centroid(subspaces: int, width: int, bits: int, is_shared: bool) -> None:
    table = centroids(1 if is_shared else subspaces, 1 << bits, width)
    x = torch.randn(2, 3, 37, subspaces * width, generator=torch.Generator().manual_seed(1))
    codes = pq.encode(x, table)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 3, 37, subspaces)
    parts = x.double().view(2, 3, 37, subspaces, 1, width)
    distance = (parts - table.double()).square().sum(-1)
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    # float32 sums of `width` squares: two centroids this close may change places
    assert (chosen <= distance.amin(-1) * (1 + 1e-5) + 1e-9).all()


def test_ties_go_to_the_lowest_index() -> None:
    table = torch.zeros(8, 16, 2)
    table[:, 5:] = 1.0  # 0..4 equal, 5..15 equal
    assert (pq.encode(torch.zeros(1, 4, 16), table) == 0).all()
    assert (pq.encode(torch.ones(1, 4, 16), table) == 5).all()


def test_codes_do_not_depend_on_how_tokens_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    table, x = centroids(8, 256, 4), torch.randn(2, 100, 32)
    whole = pq.encode(x, table)
    monkeypatch.setattr(pq, "_CHUNK_NUMBERS", {"cpu": 1})
    assert torch.equal(pq.encode(x, table), whole)


def test_decoded_centroids_encode_to_themselves() -> None:
    table = centroids(1, 64, 2)
    codes = torch.randint(0, 64, (3, 2, 50, 16), dtype=torch.uint8)
    decoded = pq.decode(codes, table)
    assert decoded.dtype == torch.float32
    assert torch.equal(pq.encode(decoded, table), codes)
    assert pq.decode(codes, table, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    table, x = centroids(8, 16, 4), torch.randn(2, 20, 32).to(dtype)
    assert torch.equal(pq.encode(x, table), pq.encode(x.float(), table))


def test_zero_tokens_and_non_finite_numbers() -> None:
    table = centroids(8, 16, 4)
    assert pq.encode(torch.empty(2, 0, 32), table).shape == (2, 0, 8)
    assert pq.decode(torch.empty(2, 0, 8, dtype=torch.uint8), table).shape == (2, 0, 32)
    assert (pq.encode(torch.full((2, 3, 32), float("nan")), table) == 0).all()
    assert (pq.encode(torch.full((2, 3, 32), float("inf")), table) == 0).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    table = centroids(8, 16, 4)
    with pytest.raises(ValueError, match=r"vectors of 33 numbers do not fit centroids \(8, 16, 4\)"):
        pq.encode(torch.randn(2, 5, 33), table)
    with pytest.raises(ValueError, match="vectors of 36 numbers do not fit"):
        pq.encode(torch.randn(2, 5, 36), table)
    with pytest.raises(ValueError, match=r"ask for \(\.\.\., 8\)"):
        pq.decode(torch.zeros(3, 5, 9, dtype=torch.uint8), table)
    with pytest.raises(ValueError, match="C from 1 to 256"):
        pq.encode(torch.randn(2, 5, 32), torch.zeros(8, 257, 4))
