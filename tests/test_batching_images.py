"""Images under continuous batching: what `generate` says to them, shared by what they show, and refused where unknown."""

from __future__ import annotations

from collections.abc import Iterator
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
from hf_pqcache.batching.images import why_unfit  # noqa: E402

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


def test_room_is_for_new_images_only() -> None:
    enable_batching(model(), images=2 * FEATURES, **CODED)
    first = image_prompt(model(), *CASES[2][:1], pixels()[[2, 0]])
    assert image_prompt(model(), CASES[2][0], pixels()[[2, 0]]) == first
    assert image_prompt(model(), CASES[2][0], pixels()[[2, 2]])[3:19] == first[3:19]
    with pytest.raises(ValueError, match="room for 32 tokens of images"):
        image_prompt(model(), CASES[1][0], pixels()[[1]])
    enable_batching(model(), images=FEATURES, **CODED)
    assert len(image_prompt(model(), CASES[1][0], pixels()[[1]])) == len(CASES[1][0])


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
