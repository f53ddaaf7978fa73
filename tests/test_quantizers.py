"""The published quantizers that we compare with: what their papers say of them, and that each is a whole Cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache.config import PQConfig
from hf_pqcache.eval import quantizers
from hf_pqcache.eval.quantizers.integers import PerChannel, PerToken
from hf_pqcache.eval.quantizers.kvquant import DenseAndSparse
from hf_pqcache.eval.quantizers.packing import pack, unpack
from hf_pqcache.eval.quantizers.turboquant import Turbo, levels
from hf_pqcache.eval.session.caches import CacheSpec, check_name, weigh
from hf_pqcache.eval.session.given import check_given
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = (
    "kivi:4",
    "kivi:3:g32",
    "kivi:2:own",
    "turboquant:4",
    "turboquant:3.5",
    "turboquant:2.5:own",
    "int4-token",
    "kvquant:3",
)
CPU = torch.device("cpu")
SMALL = PQConfig(page_size=16, extended_residual=16)


def made(name: str, model: Any, config: PQConfig = SMALL) -> Any:
    return CacheSpec.parse(name, 16, config).make(model, 256)


def run(model: Any, cache: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(ids, **cache_kwargs(cache)).logits
    return logits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 16, 40])
def test_codes_are_packed_without_gaps(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, math.ceil(bits * count / 8))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_kivi_by_hand() -> None:
    """Two channels over four tokens at 2 bits: scale and offset of a channel are those of its four numbers."""
    x = torch.tensor([[0.0, 10.0], [1.0, 10.0], [2.9, 40.0], [3.0, 20.0]])[None, None]
    keys = PerChannel(2, 4)
    packed, scale, offset = keys.encode(x, ())
    assert unpack(packed, 2, 4).squeeze().tolist() == [[0, 1, 3, 3], [0, 0, 3, 1]]
    assert (scale.squeeze().tolist(), offset.squeeze().tolist()) == ([1.0, 10.0], [0.0, 10.0])
    decoded = keys.decode((packed, scale, offset), (), 2)
    assert decoded.squeeze().tolist() == [[0.0, 10.0], [1.0, 10.0], [3.0, 40.0], [3.0, 20.0]]
    values = PerToken(2, 2)
    assert torch.allclose(values.decode(values.encode(x, ()), (), 2), x, atol=0.02)  # two numbers are their own ends


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("quantizer", [PerChannel, PerToken])
def test_integers_are_at_most_half_a_step_away(quantizer: Any, bits: int) -> None:
    x = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(bits)) * 10 + 3
    made = quantizer(bits, 64)
    axis = 2 if quantizer is PerChannel else 3
    groups = x.unflatten(axis, (-1, 64))
    step = (groups.amax(axis + 1, keepdim=True) - groups.amin(axis + 1, keepdim=True)) / (2**bits - 1)
    error = (made.decode(made.encode(x, ()), (), 64) - x).unflatten(axis, (-1, 64)).abs()
    assert (error <= step / 2 + 0.05).all()  # and what float16 rounds away of an offset of 40
    assert error.max() > step.min() / 4


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_turboquant_has_the_distortion_of_its_paper(bits: int, published: float) -> None:
    """Theorem 1: the squared error of a unit vector at 1 to 4 bits, whatever the vector is."""
    x = torch.randn(1, 1, 512, 128, generator=torch.Generator().manual_seed(0)).pow(5)  # a few numbers are most of it
    made = Turbo(bits)
    error = (made.decode(made.encode(x, ()), (), 128) - x).square().sum(-1) / x.square().sum(-1)
    assert float(error.mean()) == pytest.approx(published, rel=0.16 if bits == 3 else 0.06)  # the paper rounds 0.0345


def test_lloyd_max_levels_of_many_channels_are_those_of_a_gaussian() -> None:
    """Max 1960, table I: 2 bits, levels 0.4528 and 1.510."""
    assert (levels(4096, 2, CPU) * 64).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], rel=2e-3)


@pytest.mark.parametrize("is_per_channel", [True, False])
def test_one_number_in_a_hundred_is_exact_and_widens_no_range(is_per_channel: bool) -> None:
    x = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    loud = torch.randperm(64 * 64, generator=torch.Generator().manual_seed(1))[:40]
    spoilt = x.unflatten(2, (2, 64)).flatten(3).index_fill(3, loud, 100.0).unflatten(3, (64, 64)).flatten(2, 3)
    made = DenseAndSparse(4, is_per_channel)
    decoded = made.decode(made.encode(spoilt, ()), (), 64)
    assert (decoded[spoilt == 100] == 100).all()
    error, usual = (decoded - spoilt).square().mean(), (made.decode(made.encode(x, ()), (), 64) - x).square().mean()
    assert error < 1.3 * usual  # of its own outliers few are left out now
    even = PerChannel(4) if is_per_channel else PerToken(4)
    assert usual < 0.8 * (even.decode(even.encode(x, ()), (), 64) - x).square().mean()


def test_outlier_channels_get_the_higher_bits() -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loud = torch.arange(0, 64, 2)
    x[..., loud] *= 20
    half, whole = Turbo(2.5), Turbo(2)
    fitted = half.fit(x)
    assert torch.equal(fitted[0][0, 0, :32].long(), loud)
    error = (half.decode(half.encode(x, fitted), fitted, 64) - x).square()
    rough = (whole.decode(whole.encode(x, ()), (), 64) - x).square()
    assert error.sum() < 0.4 * rough.sum()  # a bit less is a quarter of the error
    assert error[..., loud + 1].sum() < 0.01 * rough[..., loud + 1].sum()  # of their own norm, not of the outliers'


@pytest.mark.parametrize("name", NAMES)
def test_true_bits_are_the_bytes_that_tokens_take(name: str) -> None:
    model = build("llama")
    spec = CacheSpec.parse(name, 16, SMALL)
    cache = spec.make(model, 256)
    run(model, cache, tokens(2, 128 + 20 + 128))
    sides = [[8 * side.nbytes()["codes"] / (2 * side.num_coded * 2 * 16) for side in layer.sides] for layer in cache.layers]
    assert all(sum(pair) / 2 == spec.true_bits(model.config) for pair in sides)
    stats = cache.stats()
    assert stats["bytes"]["codes"] == sum(side.nbytes()["codes"] for layer in cache.layers for side in layer.sides)
    assert weigh(cache, model, 2 * 276).tokens == stats["bytes_total"] == sum(stats["bytes"].values())


def test_bits_count_every_scale() -> None:
    model = build("llama")  # head_dim 16: no group of 64 fits a vector
    bits = {name: CacheSpec.parse(name, 16).true_bits(model.config) for name in ("kivi:4", "kivi:2:g32", "turboquant:3.5")}
    assert bits == {"kivi:4": (4.5 + 6) / 2, "kivi:2:g32": (3 + 4) / 2, "turboquant:3.5": 3.5 + 2}


@pytest.mark.parametrize("name", NAMES)
def test_attention_reads_what_the_cache_holds(name: str) -> None:
    """At every step the logits are those of an exact cache that is filled with the decoded tokens."""
    model = build("llama")
    cache, ids = made(name, model), tokens(2, 160)
    run(model, cache, ids[:, :100])
    for step in range(100, 150, 7):
        plain = DynamicCache(config=model.config)
        for i, layer in enumerate(cache.layers):
            plain.update(*(side.seen() for side in layer.sides), i)
        assert plain.get_seq_length() == cache.get_seq_length() == step
        part = ids[:, step : step + 7]
        assert torch.allclose(run(model, cache, part), run(model, plain, part), atol=1e-5)


@pytest.mark.parametrize("name", ["kivi:4:g32", "turboquant:4", "int4-token"])
def test_sinks_and_the_newest_tokens_are_exact_and_no_others(name: str) -> None:
    model = build("llama")
    cache, exact, ids = made(name, model), DynamicCache(config=model.config), tokens(2, 200)
    run(model, cache, ids)  # at once: keys and values of every layer are computed from exact ones
    run(model, exact, ids)
    block = 32 if name.startswith("kivi") else 16
    coded = (200 - 4 - 16) // block * block
    for layer, plain in zip(cache.layers, exact.layers, strict=True):
        for side, x in zip(layer.sides, (plain.keys, plain.values), strict=True):
            same = (side.seen() == x).all(-1).all(1)
            assert same[:, :4].all()
            assert same[:, 4 + coded :].all()
            assert not same[:, 4 : 4 + coded].any()


def test_the_window_of_kivis_authors() -> None:
    """Up to 127 keys stay exact and leave by 128; 128 values stay and leave one by one."""
    model = build("llama")
    cache = made("kivi:4:own", model)
    run(model, cache, tokens(1, 300))
    keys, values = cache.layers[0].sides
    assert (keys.num_coded, values.num_coded) == (256, 172)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_and_move(name: str) -> None:
    model, ids = build("llama"), tokens(3, 170)
    cache = made(name, model)
    run(model, cache, ids[:, :150])
    alone = made(name, model)
    run(model, alone, ids[1:2, :150])
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    expected = run(model, alone, ids[1:2, 150:])
    found = run(model, cache, ids[[1, 1, 2, 2], 150:])
    assert torch.allclose(found[:2], expected.expand(2, -1, -1), atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0
    run(model, cache, ids[:, :150])
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.allclose(run(model, cache, ids[1:2, 150:]), expected, atol=1e-5)


def test_what_is_exact_can_be_cropped_and_codes_cannot() -> None:
    model, ids = build("llama"), tokens(1, 120)
    cache, short = made("int4-token", model), made("int4-token", model)
    run(model, cache, ids[:, :100])
    run(model, short, ids[:, :100])
    run(model, cache, ids[:, 110:115])
    cache.crop(-5)
    assert torch.equal(run(model, cache, ids[:, 100:]), run(model, short, ids[:, 100:]))
    with pytest.raises(ValueError, match=r"crop\(-50\): the newest \d+ of 120 tokens are exact"):
        cache.crop(-50)
    with pytest.raises(ValueError, match="give minus the number"):
        cache.crop(3)
    assert cache.get_seq_length() == 120


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_runs_as_with_an_exact_cache(options: dict[str, Any]) -> None:
    """With a window that holds everything the answer is the exact cache's; with a small one there is an answer."""
    model, ids = build("llama"), tokens(2, 60)
    common: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    expected = model.generate(ids, **common)
    torch.manual_seed(0)
    wide = made("kivi:4", model, SMALL.replace(extended_residual=128))
    assert torch.equal(model.generate(ids, **cache_kwargs(wide), **common), expected)
    for name in ("kivi:2:own", "turboquant:2.5"):
        cache = made(name, model)
        assert model.generate(ids, **cache_kwargs(cache), **common).shape == expected.shape
        assert cache.get_seq_length() == 79


def test_layers_that_slide_stay_exact() -> None:
    model = build("gemma3")
    cache = made("kivi:4", model)
    run(model, cache, tokens(1, 100))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds.count("QuantizedLayer") == 1
    assert kinds.count("DynamicSlidingWindowLayer") == 1


def test_a_copy_goes_its_own_way() -> None:
    model, ids = build("llama"), tokens(1, 120)
    cache = made("turboquant:2.5", model)
    run(model, cache, ids[:, :90])
    twin = copy.deepcopy(cache)
    run(model, twin, ids[:, 90:100])
    assert (cache.get_seq_length(), twin.get_seq_length()) == (90, 100)


def test_names_of_methods_are_read_and_bad_ones_refused() -> None:
    assert check_name("turboquant:3.5") == ("turboquant", 3.5, ())
    assert check_name("kivi:2:g32:own") == ("kivi", 2, ("g32", "own"))
    window = {"sink_tokens": 4, "extended_residual": 128, "page_size": 64}
    assert CacheSpec.parse("kivi", 64).settings == {"nbits": 4, "group": 64, **window}
    assert CacheSpec.parse("int4-token:own", 64).settings == {"group": 64, "window": "own"}
    assert CacheSpec.parse("kivi:2:g32:own", 64).label == "kivi 2 bits, groups of 32, own window"
    for text, why in (
        ("kivi:5", r"use one of \(4, 3, 2\)"),
        ("kivi:4:3", r"use one of \(4, 3, 2\)"),
        ("kivi:g16", r"'g16' is unknown; use one of \('g64', 'g32', 'own'\)"),
        ("turboquant:4:g32", r"'g32' is unknown; use one of \('own',\)"),
        ("int4-token:4", "no choice of bits"),
        ("kivi:", r"use one of \(4, 3, 2\)"),
        ("dynamic:own", "no choice of bits"),
        ("quanto:4:own", r"use one of \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=why):
            check_name(text)
    assert set(quantizers.METHODS) == {"kivi", "turboquant", "kvquant", "int4-token"}


def test_options_of_a_window_are_for_all_that_share_it() -> None:
    nothing: dict[str, str | None] = {}
    check_given(["kivi:4"], {"extended_residual": 64, "sink_tokens": 2, "page_size": 32}, None, nothing)
    with pytest.raises(ValueError, match="--extended-residual does nothing for kivi:4:own"):
        check_given(["kivi:4:own"], {"extended_residual": 64}, None, nothing)
    with pytest.raises(ValueError, match="-M does nothing for turboquant:4"):
        check_given(["turboquant:4"], {"num_subspaces": 64}, None, nothing)
