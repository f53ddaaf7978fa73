"""encode is nearest, decode inverts it on centroids, and attention by tables equals attention on decoded codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_pqcache.codebook import pq


def centroids(heads: int, subspaces: int, count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, subspaces, count, width, generator=generator).half()


@pytest.mark.parametrize(("subspaces", "width", "bits"), [(8, 8, 4), (16, 2, 8), (32, 1, 5), (16, 4, 6)])
def test_encode_finds_the_nearest_centroid(subspaces: int, width: int, bits: int) -> None:
    table = centroids(3, subspaces, 1 << bits, width)
    x = torch.randn(2, 3, 37, subspaces * width, generator=torch.Generator().manual_seed(1))
    codes = pq.encode(x, table)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 3, 37, subspaces)
    parts = x.double().view(2, 3, 37, subspaces, 1, width)
    distance = (parts - table.double()[None, :, None]).square().sum(-1)
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    # float32 sums of `width` squares: two centroids this close may change places
    assert (chosen <= distance.amin(-1) * (1 + 1e-5) + 1e-9).all()


def test_ties_go_to_the_lowest_index() -> None:
    table = torch.zeros(1, 8, 16, 2)
    table[:, :, 5:] = 1.0  # 0..4 equal, 5..15 equal
    assert (pq.encode(torch.zeros(1, 4, 16), table) == 0).all()
    assert (pq.encode(torch.ones(1, 4, 16), table) == 5).all()


def test_codes_do_not_depend_on_how_tokens_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    table, x = centroids(2, 8, 256, 4), torch.randn(2, 100, 32)
    whole = pq.encode(x, table)
    monkeypatch.setattr(pq, "_CHUNK_NUMBERS", {"cpu": 1})
    assert torch.equal(pq.encode(x, table), whole)


def test_decoded_centroids_encode_to_themselves() -> None:
    table = centroids(2, 16, 64, 2)
    codes = torch.randint(0, 64, (3, 2, 50, 16), dtype=torch.uint8)
    decoded = pq.decode(codes, table)
    assert decoded.dtype == torch.float32
    assert torch.equal(pq.encode(decoded, table), codes)
    assert pq.decode(codes, table, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    table, x = centroids(2, 8, 16, 4), torch.randn(2, 20, 32).to(dtype)
    assert torch.equal(pq.encode(x, table), pq.encode(x.float(), table))


def test_zero_tokens_and_non_finite_numbers() -> None:
    table = centroids(2, 8, 16, 4)
    assert pq.encode(torch.empty(2, 0, 32), table).shape == (2, 0, 8)
    assert pq.decode(torch.empty(2, 0, 8, dtype=torch.uint8), table).shape == (2, 0, 32)
    assert (pq.encode(torch.full((2, 3, 32), float("nan")), table) == 0).all()
    assert (pq.encode(torch.full((2, 3, 32), float("inf")), table) == 0).all()


@pytest.mark.parametrize(("groups", "queries"), [(1, 1), (4, 1), (2, 7)])
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_attention_by_tables_equals_sdpa_on_decoded_codes(groups: int, queries: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(groups)
    key_table, value_table = centroids(2, 16, 256, 2), centroids(2, 8, 256, 3, seed=1)
    key_codes = torch.randint(0, 256, (3, 2, 90, 16), dtype=torch.uint8, generator=generator)
    value_codes = torch.randint(0, 256, (3, 2, 90, 8), dtype=torch.uint8, generator=generator)
    q = torch.randn(3, 2 * groups, queries, 32, generator=generator)
    mask = None
    if masked != "none":
        mask = torch.rand(3, 1, queries, 90, generator=generator) > 0.4
        if masked == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    out = pq.attention(q, key_codes, value_codes, key_table, value_table, 0.3, mask)
    keys, values = pq.decode(key_codes, key_table), pq.decode(value_codes, value_table)
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert out.shape == (3, 2 * groups, queries, 24)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)  # two orders of float32 summation


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    table = centroids(1, 8, 16, 2)
    codes = torch.zeros(1, 1, 5, 8, dtype=torch.uint8)
    out = pq.attention(torch.randn(1, 1, 2, 16), codes, codes, table, table, 1.0, torch.zeros(1, 1, 2, 5, dtype=torch.bool))
    assert torch.equal(out, torch.zeros(1, 1, 2, 16))


def test_shapes_that_do_not_fit_are_named() -> None:
    table = centroids(2, 8, 16, 4)
    with pytest.raises(ValueError, match=r"ask for \(\.\.\., 2, T, 32\)"):
        pq.encode(torch.randn(2, 5, 33), table)
    with pytest.raises(ValueError, match=r"ask for \(\.\.\., 2, T, 8\)"):
        pq.decode(torch.zeros(3, 5, 8, dtype=torch.uint8), table)
    with pytest.raises(ValueError, match="C from 1 to 256"):
        pq.encode(torch.randn(2, 5, 32), torch.zeros(2, 8, 257, 4))
    codes = torch.zeros(1, 2, 5, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Hq must be a multiple of H"):
        pq.attention(torch.randn(1, 3, 1, 32), codes, codes, table, table, 1.0)
    with pytest.raises(ValueError, match="value codes have shape"):
        pq.attention(torch.randn(1, 2, 1, 32), codes, codes[:, :, :4], table, table, 1.0)
