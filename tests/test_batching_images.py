"""Images under continuous batching: what `generate` says to them, shared by what they show, and refused where unknown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from engine_runs import CODED, EXACT, engine, greedy, results
from tiny_llava import FEATURES, model, pixels, prompt

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.cache]
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
    pytest.skip("continuous batching needs transformers 5.20", allow_module_level=True)

from hf_pqcache.batching import disable_batching, enable_batching, image_prompt  # noqa: E402
from hf_pqcache.batching.images import ImagesExhaustedError, why_unfit  # noqa: E402

NEW = 20
#: Token ids, and which images.
CASES = ((prompt(1, 20, 1), [0]), (prompt(1, 60, 2), [1]), (prompt(2, 30, 3), [2, 0]), (prompt(1, 20, 1), [1]))


@cache
def alone(case: int, exact: bool) -> list[int]:
    ids, shown = CASES[case]
    made = PagedKVCache(model().config, **EXACT) if exact else PagedPQCache(model().config, **CODED)
    told = {"input_ids": torch.tensor([ids]), "pixel_values": pixels()[shown], "attention_mask": torch.ones(1, len(ids))}
    told["attention_mask"] = told["attention_mask"].long()
    out = model().generate(**told, max_new_tokens=NEW, do_sample=False, **cache_kwargs(made))
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module", autouse=True)
def _references() -> None:
    for case in range(len(CASES)):
        alone(case, True), alone(case, False)


@pytest.fixture(autouse=True)
def _own_blocks_after() -> Iterator[None]:
    yield
    disable_batching(model())
    assert "forward" not in vars(model().get_input_embeddings())


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
def test_equal_to_generate(exact: bool) -> None:
    enable_batching(model(), exact=exact, images=100, **(EXACT if exact else CODED))
    with model().continuous_batching_context_manager(
        greedy(), continuous_batching_config=engine(max_batch_tokens=40)
    ) as manager:
        # Images are looked at while the engine runs.
        asked = [image_prompt(model(), torch.tensor([ids]), pixels()[shown]) for ids, shown in CASES]
        names = [manager.add_request(ids, max_new_tokens=NEW) for ids in asked]
        found = results(manager, set(names))
        assert [found[name].generated_tokens for name in names] == [alone(case, exact) for case in range(len(CASES))]
    disable_batching(model())
    assert alone.__wrapped__(0, exact) == alone(0, exact), "generate is as it was"


def test_prefixes_are_shared_by_what_images_show() -> None:
    enable_batching(model(), exact=True, images=100, **EXACT)
    config = engine(allow_block_sharing=True)
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:

        def shared(image: int) -> int:
            before = manager.stats()["prefix_tokens"]
            ids = image_prompt(model(), prompt(1, 40, 1), pixels()[[image]].clone())
            name = manager.add_request(ids, max_new_tokens=2)
            assert results(manager, {name})[name].error is None
            return int(manager.stats()["prefix_tokens"] - before)

        assert [shared(0), shared(0) > 0, shared(1), shared(1) > 0] == [0, True, 0, True]


def test_the_oldest_image_makes_room_and_ids_are_given_once() -> None:
    enable_batching(model(), images=2 * FEATURES + 3, **CODED)  # rows are taken in whole images

    def ids(*shown: int) -> list[int]:
        return image_prompt(model(), prompt(len(shown), 5, 1), pixels()[list(shown)])

    first = ids(2, 0)
    assert ids(2, 0) == first
    assert ids(2, 2)[3 : 3 + FEATURES] == first[3 : 3 + FEATURES]
    others = [*ids(1), *ids(2), *ids(0)]  # each pushes out the one before the last
    assert set(others) & set(first) == set(first) - set(range(128, 10**6))
    with pytest.raises(ImagesExhaustedError, match="room for 35 tokens of images, 32 are of requests under way, and 16 more"):
        ids(0, 1, 2)
    assert len(ids(0, 0, 1)) == len(prompt(3, 5, 1))


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
def test_many_images_in_little_room(exact: bool) -> None:
    """Each looks at its own, whatever was where before."""
    enable_batching(model(), exact=exact, images=2 * FEATURES, **(EXACT if exact else CODED))
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=engine()) as manager:
        for case in (0, 1, 2, 3, 0, 2, 1):
            ids, shown = CASES[case]
            name = manager.add_request(image_prompt(model(), ids, pixels()[shown]), max_new_tokens=NEW)
            assert results(manager, {name})[name].generated_tokens == alone(case, exact)


def test_requests_under_way_keep_their_images() -> None:
    """Those that a soft reset or a fork makes, too. One whose image is forgotten before it comes fails alone."""
    enable_batching(model(), images=FEATURES, **CODED)
    with model().continuous_batching_context_manager(greedy(2), continuous_batching_config=engine()) as manager:
        late = image_prompt(model(), CASES[1][0], pixels()[[1]])
        running = image_prompt(model(), CASES[0][0], pixels()[[0]])
        long = manager.add_request(running, max_new_tokens=470)
        forgotten = manager.add_request(late, max_new_tokens=2)
        found = results(manager, {forgotten})
        assert "has been forgotten" in found[forgotten].error
        while manager.stats()["requests"]["running"] < 2:
            time.sleep(0.01)
        manager.cancel_request(long)
        while manager.stats()["requests"]["running"] > 1:
            time.sleep(0.01)
        with pytest.raises(ImagesExhaustedError, match="16 are of requests under way"):  # of the fork
            image_prompt(model(), CASES[1][0], pixels()[[1]])
        manager.cancel_request(f"{long}__child#0")
        name = manager.add_request(when_there_is_room(1), max_new_tokens=NEW)
        found = results(manager, {name, f"{name}__child#0"})
        assert [one.generated_tokens for one in found.values()] == 2 * [alone(1, False)]
        when_there_is_room(0)  # what has ended holds nothing
        assert manager.stats()["images"] == {"room": FEATURES, "remembered": FEATURES, "held": 0}


def when_there_is_room(case: int) -> list[int]:
    for _ in range(200):
        with suppress(ImagesExhaustedError):
            return image_prompt(model(), CASES[case][0], pixels()[CASES[case][1]])
        time.sleep(0.05)
    raise AssertionError("an image is held for ever")


def test_a_prompt_is_looked_at_again_after_a_soft_reset() -> None:
    """A pool that does not hold all of them until their ends."""
    enable_batching(model(), images=3 * FEATURES, **CODED)
    config = engine(num_blocks=20)
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        asked = [image_prompt(model(), ids, pixels()[shown]) for ids, shown in CASES]
        names = [manager.add_request(ids, max_new_tokens=NEW) for ids in asked]
        found = results(manager, set(names))
    assert [found[name].generated_tokens for name in names] == [alone(case, False) for case in range(len(CASES))]


def test_a_model_with_adapters_takes_images() -> None:
    peft = pytest.importorskip("peft")
    try:
        adapted = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
        enable_batching(adapted, images=FEATURES, **CODED)
        ids = image_prompt(adapted, CASES[0][0], pixels()[[0]])
        assert ids == image_prompt(model(), CASES[0][0], pixels()[[0]])
        assert max(ids) == 128 + FEATURES - 1
    finally:
        adapted.unload()


def test_a_prompt_without_its_image_tokens_is_refused() -> None:
    enable_batching(model(), images=100, **CODED)
    with pytest.raises(ValueError, match="has 15 image tokens, and its 1 images have 16 features"):
        image_prompt(model(), CASES[0][0][4:], pixels()[[0]])


def test_images_need_room_first() -> None:
    enable_batching(model(), **CODED)
    with pytest.raises(ValueError, match="images="):
        image_prompt(model(), CASES[0][0], pixels()[[0]])
    with pytest.raises(ValueError, match="images=0"):
        enable_batching(model(), images=0, **CODED)


def test_what_is_not_known_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="takes no images"):
        enable_batching(tiny_models.build("llama"), images=10)

    def seeing(kind: str, forward: Any, **text: Any) -> Any:
        config = SimpleNamespace(model_type=kind, get_text_config=lambda: SimpleNamespace(**text))
        return SimpleNamespace(config=config, get_image_features=None, forward=forward)

    turning = seeing("qwen2_vl", lambda ids: None, rope_parameters={"mrope_section": [16, 24, 24]})
    assert "M-RoPE" in str(why_unfit(turning))
    assert "attend to later ones" in str(why_unfit(seeing("gemma3", lambda ids, token_type_ids: None)))
    assert "not known here" in str(why_unfit(seeing("idefics", lambda ids: None)))
