"""The learnt press where prompts have images: its groups, what it computes in a cache and in an engine, and its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava import FEATURES, IMAGE, pixels, prompt
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, pressed
from hf_pqcache.compressors.groups import groups_of
from hf_pqcache.compressors.mlp import MLPCompressor
from hf_pqcache.compressors.training import Sample, Training, divergence, train
from hf_pqcache.eval.learnt_press import learn
from hf_pqcache.eval.session.models import load_model
from hf_pqcache.eval.session.pictures import samples_of
from hf_pqcache.models.names import NAMES, cache_kwargs

SHAPE = {"factor": 4, "sinks": 2, "recent": 8}
#: 97 tokens: 3 of text, 16 of an image, 2, 16, 2, then 58 of text.
IDS, SHOWN = prompt(2, 58, 3), [2, 0]


def press(images: bool = True) -> MLPCompressor:
    """Networks that do something: those of text and of images, of keys and of values, each something else."""
    torch.manual_seed(0)
    made = MLPCompressor(2, 16, 16, **SHAPE, images=images)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2)
    return made


def by_hand(is_image: list[bool], factor: int, sinks: int, recent: int, merges: bool) -> list[list[int]]:
    """Tokens of each group, and those that stay by themselves, as one walks along a prompt."""
    found: list[list[int]] = []
    at, count = 0, len(is_image)
    while at < count:
        group = list(range(at, at + factor))
        begin = at
        while begin > sinks and is_image[begin - 1] == is_image[at]:
            begin -= 1
        fits = at >= sinks and group[-1] < count - recent and len({is_image[i] for i in group if i < count}) == 1
        if fits and (merges or not is_image[at]) and (at - begin) % factor == 0:
            found.append(group)
            at += factor
        else:
            found.append([at])
            at += 1
    return found


@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=8),
    factor=st.integers(2, 5),
    sinks=st.integers(0, 6),
    recent=st.integers(0, 9),
    merges=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_groups_lie_within_text_or_within_images(
    runs: list[tuple[bool, int]], factor: int, sinks: int, recent: int, merges: bool
) -> None:
    is_image = [kind for kind, length in runs for _ in range(length)]
    found = groups_of(torch.tensor(is_image, dtype=torch.bool), factor, sinks, recent, merges)
    parts = [[[int(i)] for i in found.stay], found.text.tolist(), found.images.tolist()]
    assert all(is_image[group[0]] == (kind == 2) for kind in (1, 2) for group in parts[kind])
    flat = [group for part in parts for group in part]
    assert [flat[i] for i in found.order] == by_hand(is_image, factor, sinks, recent, merges)
    assert found.kept == len(flat)


def reference(made: MLPCompressor, module: Any, keys: Tensor, values: Tensor, kwargs: Any) -> list[Tensor]:
    """What the press makes of one row (1, H, T, d), group by group."""
    from transformers.models.llama.modeling_llama import rotate_half

    cos, sin = kwargs["position_embeddings"]
    is_image, layer = [i == IMAGE for i in IDS], module.layer_idx
    out: list[list[Tensor]] = [[], []]
    for group in by_hand(is_image, **SHAPE, merges=made.merges_images):
        if len(group) == 1:
            out[0].append(keys[:, :, group[0]])
            out[1].append(values[:, :, group[0]])
            continue
        nets = (made.image_keys, made.image_values) if is_image[group[0]] else (made.keys, made.values)
        c, s = cos[:, group[2]], sin[:, group[2]]
        turned = keys[:, :, group] * c - rotate_half(keys[:, :, group]) * s
        merged = nets[0][layer](turned)
        out[0].append(merged * c + rotate_half(merged) * s)
        out[1].append(nets[1][layer](values[:, :, group]))
    return [torch.stack(side, dim=2) for side in out]


def inputs(rows: int = 1) -> dict[str, Any]:
    ids = torch.tensor([IDS] * rows)
    return {"input_ids": ids, "pixel_values": pixels()[SHOWN * rows], "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def expected(made: MLPCompressor, new: int) -> list[int]:
    """Greedy tokens over a DynamicCache whose prompt is replaced by what `reference` makes of it."""
    model, cache = tiny_llava.model(), DynamicCache(config=tiny_llava.model().config)

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = next(kwargs[name] for name in NAMES if name in kwargs).layers[module.layer_idx]
        layer.keys, layer.values = reference(made, module, layer.keys, layer.values, kwargs)

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.language_model.layers]
    told = inputs()
    del told["attention_mask"]
    token = model(**told, **cache_kwargs(cache)).logits[:, -1:].argmax(-1)
    for handle in handles:
        handle.remove()
    found = [int(token)]
    for place in range(len(IDS), len(IDS) + new - 1):
        token = model(token, position_ids=torch.tensor([[place]]), **cache_kwargs(cache)).logits[:, -1:].argmax(-1)
        found.append(int(token))
    return found


@pytest.mark.parametrize("images", [True, False])
def test_a_cache_holds_what_each_network_makes_of_its_groups(images: bool) -> None:
    made, model = press(images), tiny_llava.model()
    kept = len(by_hand([i == IMAGE for i in IDS], **SHAPE, merges=images))
    cache = PagedKVCache(model.config, page_size=16)
    with pressed(model, made):
        out = model.generate(**inputs(), max_new_tokens=12, do_sample=False, **cache_kwargs(cache))
        rows = model.generate(
            **inputs(2), max_new_tokens=12, do_sample=False, **cache_kwargs(PagedKVCache(model.config, page_size=16))
        )
    assert out[0, len(IDS) :].tolist() == expected(made, 12)
    assert rows.tolist() == [out[0].tolist()] * 2
    assert cache.stats()["removed"] == dict.fromkeys((0, 1), len(IDS) - kept)
    assert ("tokens of images stay" in cache.stats()["press"]) == (not images)


def test_rows_with_images_in_other_places() -> None:
    """They are merged each by itself, where as many tokens are left of them."""
    model, made = tiny_llava.model(), press()
    shifted = [*IDS[19:21], *IDS[3:19], *IDS[:3], *IDS[21:]]  # its first image begins a token earlier
    for other, refused in ((shifted, False), ([7, 7, *IDS[:-2]], True)):
        ids = torch.tensor([IDS, other])
        shown = pixels()[SHOWN + SHOWN[: other.count(IMAGE) // FEATURES]]
        cache = PagedKVCache(model.config, page_size=16)
        with pressed(model, made), torch.no_grad():
            if refused:
                with pytest.raises(ValueError, match="images in other places"):
                    model(ids, pixel_values=shown, **cache_kwargs(cache))
                assert cache.get_seq_length() == 0
                continue
            model(ids, pixel_values=shown, **cache_kwargs(cache))
            for row in (0, 1):
                alone = PagedKVCache(model.config, page_size=16)
                model(ids[row : row + 1], pixel_values=shown[2 * row : 2 * row + 2], **cache_kwargs(alone))
                for a, b in zip(cache.layers, alone.layers, strict=True):
                    assert torch.allclose(a.keys[row], b.keys[0], atol=1e-5)
                    assert torch.allclose(a.values[row], b.values[0], atol=1e-5)


def test_embeddings_do_not_tell_what_is_an_image() -> None:
    model, cache = tiny_llava.model(), PagedKVCache(tiny_llava.model().config, page_size=16)
    with pressed(model, press()), torch.no_grad(), pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=torch.randn(1, 90, 32), **cache_kwargs(cache))
    assert cache.get_seq_length() == 0


@pytest.mark.skipif(tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20), reason="needs transformers 5.20")
@pytest.mark.parametrize("images", [True, False])
def test_an_engine_merges_images_as_generate_does(images: bool) -> None:
    from engine_runs import EXACT, engine, greedy, results

    from hf_pqcache.batching import disable_batching, enable_batching, image_prompt

    model, made = tiny_llava.model(), press(images)
    wanted = expected(made, 12)
    enable_batching(model, exact=True, images=100, press=made, **EXACT)
    try:
        with model.continuous_batching_context_manager(
            greedy(), continuous_batching_config=engine(max_batch_tokens=40)
        ) as manager:
            asked = image_prompt(model, IDS, pixels()[SHOWN])
            names = [manager.add_request(asked, max_new_tokens=12), manager.add_request(IDS[21:], max_new_tokens=1)]
            found = results(manager, set(names))
            assert found[names[0]].generated_tokens == wanted
            assert ("tokens of images stay" in manager.stats()["press"]) == (not images)
    finally:
        disable_batching(model)


def samples() -> list[Sample]:
    made = [(prompt(1, 60 + i, i), [i % 3]) for i in range(4)]
    return [Sample(torch.tensor([ids]), len(ids) - 16, pixels()[shown]) for ids, shown in made]


def test_training_lowers_the_loss_and_trains_the_networks_of_images(tmp_path: Path) -> None:
    model, training = tiny_llava.model(), Training(answer=16, batch=2, rate=3e-3)
    made = MLPCompressor(2, 16, 16, **SHAPE, images=True)
    with torch.no_grad():
        first = sum(float(divergence(model, made, sample)) for sample in samples())
    begun = [weight.clone() for weight in made.parameters()]
    train(model, made, samples(), training, steps=15, folder=tmp_path)
    with torch.no_grad():
        assert sum(float(divergence(model, made, sample)) for sample in samples()) < first
    last = [name for name, _ in made.named_parameters() if name.endswith("layers.4.weight")]
    changed = {name for (name, new), old in zip(made.named_parameters(), begun, strict=True) if not torch.equal(new, old)}
    assert len(last) == 8
    assert changed >= set(last)
    again = MLPCompressor.from_pretrained(tmp_path)
    assert again.merges_images
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True))
    losses, held_out = learn(model, samples(), training, **SHAPE, steps=2, folder=tmp_path / "learn")
    assert len(losses) == 2
    assert held_out.keys() >= {"learnt", "mean", "snapkv"}
    with pytest.raises(ValueError, match="no group of 4"):
        learn(model, samples(), training, **(SHAPE | {"recent": 80}), steps=2, folder=tmp_path / "learn")


def test_a_file_of_text_alone_still_loads(tmp_path: Path) -> None:
    press(images=False).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "compressor.json").read_text())
    del told["images"]  # as it was before there were any
    (tmp_path / "compressor.json").write_text(json.dumps(told))
    assert not MLPCompressor.from_pretrained(tmp_path).merges_images


def test_lines_of_images_and_text(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    words = " ".join(f"w{i}" for i in range(30))
    lines = [{"image": "red.png", "text": f"w1 <image> {words}"}, {"text": words}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    config, made = tiny_llava.model().config, tiny_llava.processor()
    first, second = samples_of(tmp_path / "a.jsonl", made, config, answer=10)
    assert first.ids[0].tolist() == [1, *[IMAGE] * FEATURES, *range(30)]
    assert getattr(first.pixels, "shape", None) == (1, 3, 56, 56)
    assert (first.prompt, second.prompt, second.pixels) == (37, 20, None)
    for text, match in (
        ("{", "line 1"),
        (json.dumps({"image": "no.png", "text": "<image> w1"}), "no.png"),
        (json.dumps({"image": "red.png"}), "no text"),
        (json.dumps({"image": "red.png", "text": f"{words} <image>"}), "an image is among its last 10"),
        (json.dumps({"text": "w1 w2"}), "has 2 tokens"),
        ("", "is empty"),
    ):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(ValueError, match=match):
            samples_of(tmp_path / "b.jsonl", made, config, answer=10)
    with pytest.raises(ValueError, match="takes no images"):
        samples_of(tmp_path / "a.jsonl", made, config.get_text_config(), answer=10)


def test_the_command_learns_from_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from click.testing import CliRunner

    from hf_pqcache.cli.app import main

    tiny_llava.model().save_pretrained(tmp_path / "llava")
    tiny_llava.processor().save_pretrained(tmp_path / "llava")
    image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    words = " ".join(f"w{i}" for i in range(50))
    line = json.dumps({"image": "red.png", "text": f"w1 <image> {words}"})
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    asked = ["train-compressor", "--model", str(tmp_path / "llava"), "--images", str(tmp_path / "a.jsonl"), "--quiet"]
    sizes = ["--steps", "2", "--answer", "8", "--recent", "8", "--batch", "1", "-o", str(tmp_path / "c")]
    result = CliRunner().invoke(main, [*asked, *sizes])
    assert result.exit_code == 0, result.output
    assert MLPCompressor.from_pretrained(tmp_path / "c").merges_images
    refused = CliRunner().invoke(main, [*asked, *sizes, "--prompt", "64"])
    assert refused.exit_code == 2
    assert "--prompt does nothing beside --images" in refused.output
    model, _ = load_model(tmp_path / "llava", device="cpu")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
