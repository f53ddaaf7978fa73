"""A press under continuous batching: requests say what `generate` says with the same press, however they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from engine_runs import CODED, EXACT, NEW, engine, greedy, prompts, results
from late_lane import Late
from torch import Tensor
from transformers import __version__ as transformers_version

from hf_pqcache import PagedKVCache, PagedPQCache, pressed
from hf_pqcache.compressors.expected_attention import ExpectedAttention
from hf_pqcache.compressors.knorm import Knorm
from hf_pqcache.compressors.press import ScorePress
from hf_pqcache.compressors.snapkv import SnapKV
from hf_pqcache.compressors.streaming_llm import StreamingLLM
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.cache]
if tuple(map(int, transformers_version.split(".")[:2])) < (5, 20):
    pytest.skip("continuous batching needs transformers 5.20", allow_module_level=True)

from hf_pqcache.batching import disable_batching, enable_batching  # noqa: E402

#: Each press, with settings for short prompts.
PRESSES: dict[str, Any] = {
    "knorm": Knorm(0.5),
    "snapkv": SnapKV(0.5, window=8),
    "expected-attention": ExpectedAttention(0.25, future=16),
    "streaming-llm": StreamingLLM(0.75),
}
CHOSEN = (3, 7, 8, 9, 10, 11)


@cache
def model() -> Any:
    torch.manual_seed(0)
    return tiny_models.build("llama").eval()


@cache
def alone(name: str, number: int, exact: bool) -> list[int]:
    """What `generate` says to a prompt with a press."""
    made = PagedKVCache(model().config, **EXACT) if exact else PagedPQCache(model().config, **CODED)
    ids = torch.tensor([prompts()[number]])
    with pressed(model(), PRESSES[name]):
        out = model().generate(ids, max_new_tokens=NEW, do_sample=False, **cache_kwargs(made))
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module", autouse=True)
def _references() -> None:
    for name in PRESSES:
        for number in CHOSEN:
            alone(name, number, True), alone(name, number, False)


@pytest.fixture(autouse=True)
def _own_blocks_after() -> Iterator[None]:
    yield
    disable_batching(model())
    assert not any(part._forward_pre_hooks or "rotary_emb" in vars(part) for part in model().model.layers.modules())


def run(press: Any, numbers: Any, exact: bool = False, sequences: int = 1, compress: Any = "inline", **config: Any) -> Any:
    """Outputs by number of the prompt and sequence, and statistics once nothing is under way."""
    enable_batching(model(), exact=exact, press=press, compress=compress, **(EXACT if exact else CODED))
    with model().continuous_batching_context_manager(greedy(sequences), continuous_batching_config=engine(**config)) as manager:
        names = {manager.add_request(list(prompts()[number]), max_new_tokens=NEW): number for number in numbers}
        names |= {f"{name}__child#{i}": number for name, number in names.items() for i in range(sequences - 1)}
        found = results(manager, set(names))
        assert manager.background_thread_status.fatal_error is None
        until = time.monotonic() + 5
        while (stats := manager.stats())["slots"]["free"] < stats["slots"]["total"] and time.monotonic() < until:
            time.sleep(0.02)
        assert stats["slots"]["free"] == stats["slots"]["total"]
        assert stats["blocks"]["free"] == stats["blocks"]["total"], "pruned blocks are not shared"
        assert stats["compression"]["waiting_tokens"] == 0
    return [(number, found[name]) for name, number in names.items()], stats


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("name", PRESSES)
def test_equal_to_generate_with_the_press(name: str, exact: bool) -> None:
    found, stats = run(PRESSES[name], CHOSEN, exact)
    for number, output in found:
        assert output.generated_tokens == alone(name, number, exact), number
    press, counts = PRESSES[name], [len(prompts()[number]) for number in CHOSEN]
    assert stats["pruned_tokens"] == sum(n - press.kept(n) for n in counts)
    assert type(press).__name__ in stats["press"]


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize(
    "changes", [{"max_batch_tokens": 16}, {"sequences": 2}, {"num_blocks": 6, "max_requests_per_batch": 4}]
)
def test_chunks_forks_and_soft_resets_change_nothing(changes: Any, exact: bool) -> None:
    found, _ = run(PRESSES["snapkv"], CHOSEN, exact, **changes)
    assert len(found) == len(CHOSEN) * changes.get("sequences", 1)
    for number, output in found:
        assert output.generated_tokens == alone("snapkv", number, exact), number


def test_pruned_prompts_are_stored_beside_other_steps() -> None:
    found, stats = run(PRESSES["knorm"], (11, *CHOSEN), compress=Late([3]))
    assert stats["compression"]["jobs"] >= 4
    for number, output in found:
        assert output.generated_tokens == alone("knorm", number, False), number


class Foreign:
    """A press that is none of ours: nobody knows before how many tokens it keeps."""

    def compress(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Any:
        kept = self.kept_of(module.layer_idx, keys.shape[2])
        return keys[:, :, -kept:], values[:, :, -kept:]

    def kept_of(self, layer: int, count: int) -> int:
        return max(1, count // 2)


class Uneven(Foreign):
    def kept_of(self, layer: int, count: int) -> int:
        return max(1, count // (2 + layer)) if count > 60 else count


class Newest(ScorePress):
    def scores(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: Any) -> Tensor:
        return torch.arange(keys.shape[2], dtype=torch.float32).expand(keys.shape[:3])


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
def test_a_press_of_others_need_not_say_before_how_much_it_keeps(exact: bool) -> None:
    numbers = (8, 10, 7)  # of even length
    ours, _ = run(Newest(0.5), [n for n in numbers if len(prompts()[n]) % 2 == 0], exact, max_batch_tokens=40)
    theirs, stats = run(Foreign(), [n for n in numbers if len(prompts()[n]) % 2 == 0], exact, max_batch_tokens=40)
    assert [o.generated_tokens for _, o in ours] == [o.generated_tokens for _, o in theirs]
    assert stats["pruned_tokens"] > 0


def test_what_does_not_fit_blocks_fails_one_request() -> None:
    found, _ = run(Uneven(), (7, 11, 8))
    for number, output in found:
        if number == 11:
            assert "as many tokens of all heads and layers" in output.error
        else:
            assert output.error is None


def test_a_prompt_too_long_to_wait_is_refused_at_once_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pqcache.batching.sizes.STAGING_SHARE", 0.0)
    found, _ = run(PRESSES["knorm"], (11, 7), max_batch_tokens=64)
    for number, output in found:
        if number == 11:
            assert "a press needs it whole" in output.error
        else:
            assert output.generated_tokens == alone("knorm", number, False)


def test_pruning_makes_room() -> None:
    """A pool too small for a prompt as it is."""
    found, _ = run(PRESSES["streaming-llm"], (11,), num_blocks=3)
    assert found[0][1].generated_tokens == alone("streaming-llm", 11, False)


@pytest.mark.parametrize(("press", "why"), [("snapkv", "after a colon"), ("best:0.5", "unknown"), (object(), "no press")])
def test_what_is_no_press_is_refused_at_once(press: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        enable_batching(model(), press=press)


def test_compiled_steps_are_refused() -> None:
    enable_batching(model(), press="knorm:0.5", **CODED)
    with pytest.raises(ValueError, match="cannot be compiled"):
        model().init_continuous_batching(greedy(), engine(default_compile_level=1))
    disable_batching(model())
    assert alone.__wrapped__("knorm", 7, False) == alone("knorm", 7, False), "generate is as it was"
