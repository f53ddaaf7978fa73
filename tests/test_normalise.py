"""Normalised codes: what a page stores stands for its tokens, whatever their scale, offset and outliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_pqcache.codebook import normalise, shipped
from hf_pqcache.config import CodeShape, PQConfig, Side
from hf_pqcache.pages.codec import CodedPages
from hf_pqcache.pages.layout import PageLayout, half_order, num_units

HEAD_DIMS = [16, 48, 64, 80, 96, 112, 128, 256]
SIDES = pytest.mark.parametrize("which", ["key", "value"])


def vectors(head_dim: int, tokens: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def stored(x: Tensor, which: Side, page_size: int = 64, **config: int) -> Tensor:
    """x (H, T, d) as pages give it back."""
    book = shipped.codebook(PQConfig(**config), x.shape[-1], x.shape[-1])
    codec = CodedPages.like(x, which, page_size, book)
    return codec.decode(codec.encode(x), x.dtype)


def loss(got: Tensor, x: Tensor) -> float:
    return float((got - x).norm() / (x - x.mean(1, keepdim=True)).norm())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_its_own_inverse_and_keeps_lengths(head_dim: int) -> None:
    x = vectors(head_dim)
    torch.testing.assert_close(normalise.rotate(normalise.rotate(x)), x)
    torch.testing.assert_close(normalise.rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert sum(normalise.blocks_of(head_dim)) == head_dim


@SIDES
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fewer_bits_lose_more_and_no_more_than_they_must(which: Side, head_dim: int) -> None:
    x = vectors(head_dim)
    lost = [loss(stored(x, which, num_bits=bits, num_subspaces=head_dim // 2), x) for bits in (8, 6, 4)]
    assert lost == sorted(lost)
    assert lost[0] < 0.12
    assert lost[1] < 0.25
    assert lost[2] < 0.5


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_constant_channels_of_keys_cost_nothing(bits: int) -> None:
    """As the biases of Qwen2.5's key projections make them, where symmetric scalar quantizers collapse."""
    x = vectors(64)
    shifted = x.clone()
    shifted[..., ::7] += 300.0
    assert loss(stored(shifted, "key", bits=bits), shifted) < 1.3 * loss(stored(x, "key", bits=bits), x)


def test_loud_channels_of_keys_drown_no_other() -> None:
    """Queries make up for a loud channel, and so feel the errors of the others as if it were not there."""
    x = vectors(64)
    loud = x.clone()
    loud[..., 5] *= 30
    codec = CodedPages.like(loud, "key", 64, shipped.codebook(PQConfig(), 64, 64))
    equal = replace(codec, equaliser=normalise.equaliser(loud[:, :64]))
    got = equal.decode(equal.encode(loud), x.dtype)
    got[..., 5] /= 30
    assert loss(got, x) < 0.11
    rotated = codec.decode(codec.encode(loud), x.dtype)
    rotated[..., 5] /= 30
    assert loss(rotated, x) > 0.2


def test_channels_that_are_alike_are_left_alone() -> None:
    assert torch.equal(normalise.equaliser(vectors(64, tokens=64)), torch.ones(2, 64))
    assert torch.equal(normalise.equaliser(torch.zeros(2, 16, 64)), torch.ones(2, 64))


@SIDES
@pytest.mark.parametrize("octaves", [-3, 5, 8])
def test_scale_is_free(which: Side, octaves: int) -> None:
    x = vectors(64)
    torch.testing.assert_close(stored(x * 2.0**octaves, which), stored(x, which) * 2.0**octaves, rtol=1e-3, atol=0)


def test_a_loud_token_drowns_no_other_value() -> None:
    x = vectors(64)
    loud = x.clone()
    loud[:, 3] *= 100
    assert torch.equal(stored(loud, "value")[:, 4:], stored(x, "value")[:, 4:])


@SIDES
def test_nothing_is_stored_as_nearly_nothing(which: Side) -> None:
    assert stored(torch.zeros(2, 64, 64), which).abs().max() < 1e-4


@SIDES
def test_half_precision_comes_back_in_half_precision(which: Side) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = vectors(64).to(dtype)
        got = stored(x, which)
        assert got.dtype == dtype
        assert loss(got.float(), x.float()) < 0.11


SHAPES = [(64, 8), (32, 8), (64, 6), (32, 6), (128, 4), (64, 4), (32, 5), (16, 7), (40, 8), (20, 5), (24, 4), (17, 8)]


@SIDES
@pytest.mark.parametrize("page_size", [16, 64, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_gives_back_what_was_packed(which: Side, page_size: int, shape: tuple[int, int]) -> None:
    m, bits = shape
    head_dim, generator = 2 * m, torch.Generator().manual_seed(0)

    def draw(*size: int, high: int = 256) -> Tensor:
        return torch.randint(high, size, generator=generator).to(torch.uint8)

    layout = PageLayout(which, page_size, head_dim, m, bits)
    scales: dict[str, Tensor] = {"magnitude": draw(3, 2, page_size)}
    if which == "key":
        scales = {
            "magnitude": draw(3, 2, head_dim),
            "mean": draw(3, 2, head_dim).view(torch.int8),
            "step": torch.rand(3, 2).half(),
        }
    codes = draw(3, 2, page_size, m, high=1 << bits)
    blocks = layout.pack(codes, **scales)
    assert blocks.shape == (3, 2, layout.nbytes)
    assert layout.nbytes % 16 == 0
    got, found = layout.unpack(blocks)
    assert torch.equal(got, codes)
    assert found.keys() == scales.keys()
    assert all(torch.equal(found[name], scales[name]) for name in scales)


@SIDES
@pytest.mark.parametrize("head_dim", [64, 80])
def test_no_page_at_all_is_no_token(which: Side, head_dim: int) -> None:
    config, like = PQConfig(), torch.randn(2, 64, head_dim)
    codec = CodedPages.like(like, which, config.page_size, shipped.codebook(config, head_dim, head_dim))
    pages = codec.encode(like[:, :0])
    assert pages.shape == (0, *codec.spec.shape)
    assert codec.decode(pages, torch.float32).shape == (2, 0, head_dim)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves_of_words_of_a_tile_are_dealt_without_loss(shape: tuple[int, int]) -> None:
    order = half_order(*shape)
    assert (order is None) == (num_units(*shape) is None)
    if order is not None:
        assert torch.equal(order.sort().values, torch.arange(order.numel()))


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({}, CodeShape(64, 8), CodeShape(64, 8)),
        ({"num_bits": 6}, CodeShape(64, 6), CodeShape(64, 6)),
        ({"num_subspaces": 32, "value_bits": 5}, CodeShape(32, 8), CodeShape(32, 5)),
        ({"value_subspaces": 16}, CodeShape(64, 8), CodeShape(16, 8)),
    ],
)
def test_each_side_has_codes_of_its_own(config: dict[str, int], key: CodeShape, value: CodeShape) -> None:
    assert PQConfig(**config).codes("key", 128) == key
    assert PQConfig(**config).codes("value", 128) == value


@pytest.mark.parametrize(("bits", "most"), [(4, 4.25), (3, 3.25), (2, 2.3)])
def test_operating_points_take_the_bits_they_promise(bits: int, most: float) -> None:
    for head_dim in (64, 128):
        config = PQConfig(bits=bits)
        sides = [PageLayout(s, config.page_size, head_dim, *config.codes(s, head_dim)) for s in ("key", "value")]
        assert sum(side.bits_per_number for side in sides) / 2 <= most


@SIDES
def test_the_shipped_file_is_what_random_numbers_give(which: Side) -> None:
    name = f"{which}.2.4"
    assert name in shipped._file()
    (centroids, gain), (made, made_gain) = shipped.side(which, 2, 4), shipped.make(which, 2, 4)
    assert torch.equal(centroids, made)
    assert gain == made_gain
