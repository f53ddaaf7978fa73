"""Continuous batching over coded blocks computes what `generate` with the same cache does, whatever comes when."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from engine_runs import CODED, EXACT, NEW, alone, ask_alone, check_that_nothing_is_lost, engine, greedy, model, prompts, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from hf_pqcache import PagedPQCache, PQConfig
from hf_pqcache.batching import disable_batching, enable_batching, is_enabled, support
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.cache]
if why := support.why_unsupported():
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _references() -> None:
    ask_alone()


@pytest.fixture(autouse=True)
def _own_blocks_after() -> Iterator[None]:
    yield
    disable_batching(model())


@pytest.mark.parametrize("exact", [False, True])
def test_equal_to_generate(exact: bool) -> None:
    enable_batching(model(), exact=exact, **(EXACT if exact else CODED))
    found = model().generate_batch([list(p) for p in prompts()], greedy(), engine())
    assert [r.generated_tokens for r in found.values()] == [alone(p, exact) for p in prompts()]


def test_chunks_of_a_prompt_change_nothing() -> None:
    enable_batching(model(), **CODED)
    long = [list(p) for p in prompts() if len(p) > 30]
    for tokens in (16, 37, max(map(len, long)), 512):  # prompts that fill a step alone are cut where they share it
        found = model().generate_batch(long, greedy(), engine(max_batch_tokens=tokens))
        assert [r.generated_tokens for r in found.values()] == [alone(tuple(p), False) for p in long]


MIX = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([12, 16, 30, 200]),
        "max_batch_tokens": st.sampled_from([16, 40, 64, 256]),
        "max_requests_per_batch": st.sampled_from([1, 2, 4, 8]),
        "scheduler_type": st.sampled_from(["fifo", "prefill_first"]),
    }
)
ARRIVAL = st.tuples(
    st.integers(0, 13),  # which prompt
    st.integers(1, NEW),  # new tokens
    st.sampled_from([0.0, 0.0, 0.01, 0.05]),  # seconds before it comes
    st.sampled_from([None, None, None, 0.0, 0.02]),  # seconds until it is cancelled
)


def run_mix(mix: dict[str, Any], arrivals: list[tuple[int, int, float, float | None]], sequences: int, exact: bool) -> None:
    enable_batching(model(), exact=exact, **(EXACT if exact else CODED))
    config = engine(**mix, allow_block_sharing=exact)
    with model().continuous_batching_context_manager(greedy(sequences), continuous_batching_config=config) as manager:
        wanted: dict[str, list[int]] = {}
        for number, new, before, cancelled in arrivals:
            time.sleep(before)
            name = manager.add_request(list(prompts()[number]), max_new_tokens=new)
            if cancelled is not None:
                time.sleep(cancelled)
                manager.cancel_request(name)
                continue
            for family in [name, *(f"{name}__child#{i}" for i in range(sequences - 1))]:
                wanted[family] = alone(prompts()[number], exact)[:new]
        found = results(manager, set(wanted))
        assert manager.background_thread_status.fatal_error is None
        for name, tokens in wanted.items():
            result = found[name]
            if result.error is None:
                assert result.generated_tokens == tokens, name
            else:
                assert "PQC001" in result.error
                assert len(result.prompt_ids) + len(tokens) > mix["num_blocks"] * 16
        check_that_nothing_is_lost(manager)


LAZY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@settings(max_examples=12, **LAZY)
@given(MIX, st.lists(ARRIVAL, min_size=1, max_size=6), st.sampled_from([1, 1, 2, 3]), st.booleans())
def test_any_mix(mix: dict[str, Any], arrivals: Any, sequences: int, exact: bool) -> None:
    run_mix(mix, arrivals, sequences, exact)


@pytest.mark.slow
@settings(max_examples=200, **LAZY)
@given(MIX, st.lists(ARRIVAL, min_size=1, max_size=8), st.sampled_from([1, 1, 2, 3]), st.booleans())
def test_two_hundred_mixes(mix: dict[str, Any], arrivals: Any, sequences: int, exact: bool) -> None:
    run_mix(mix, arrivals, sequences, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_what_requests_have_and_what_of_it_is_empty(exact: bool) -> None:
    enable_batching(model(), exact=exact, **(EXACT if exact else CODED))
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=engine()) as manager:
        assert manager.stats() == {} or manager.stats()["bytes"]["owned"] == 0
        names = [manager.add_request(list(prompts()[i]), max_new_tokens=300, streaming=True) for i in (4, 11)]
        heard = dict.fromkeys(names, 0)
        while min(heard.values()) < 3:
            output = manager.get_result(timeout=60)
            heard[output.request_id] = len(output.generated_tokens)
        with manager.pause():
            while not manager.output_router.output_queue.empty():
                output = manager.get_result(timeout=0)
                heard[output.request_id] = len(output.generated_tokens)
            stats = manager.stats()
            owned, empty = stats["bytes"]["owned"], stats["bytes"]["empty"]
        assert 0 <= empty < owned
        tokens = sum(heard.values()) + len(prompts()[4]) + len(prompts()[11]) - 2  # the newest are yet to be stored
        if exact:  # a token has as many bytes in a block as in a window
            assert owned - empty == tokens * stats["blocks"]["bytes"] // 16
        else:
            assert empty > 0, "windows are not full"
        for name in names:
            manager.cancel_request(name)
        until = time.monotonic() + 30
        while manager.stats()["bytes"]["owned"] and time.monotonic() < until:
            time.sleep(0.01)
        assert (manager.stats()["bytes"]["owned"], manager.stats()["bytes"]["empty"]) == (0, 0)


def test_a_prefix_is_shared_and_computed_once() -> None:
    enable_batching(model(), **CODED)
    config = engine(allow_block_sharing=True, max_requests_per_batch=2)
    first = list(prompts()[11])
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        name = manager.add_request(first, max_new_tokens=NEW)
        assert results(manager, {name})[name].generated_tokens == alone(tuple(first), False)
        used = manager.stats()["blocks"]["shareable"]
        assert used >= 6
        again = manager.add_request([*first, 7, 8, 9], max_new_tokens=NEW)
        assert results(manager, {again})[again].error is None
        stats = manager.stats()
        coded = PQConfig(**CODED).coded_tokens(len(first) + NEW)  # 24 generated tokens are in pages, too
        assert stats["prefix_tokens"] == 4 + min(coded, (len(first) + 3 - 1 - 4) // 16 * 16)
        assert stats["prompt_tokens"] == len(first) + (len(first) + 3 - stats["prefix_tokens"])
        check_that_nothing_is_lost(manager)


def test_a_prefix_brings_the_first_tokens_of_its_own_text() -> None:
    """Also where its first block was another text's before, and where it became a page only while tokens were generated."""
    enable_batching(model(), **CODED)
    config = engine(allow_block_sharing=True, max_requests_per_batch=1, num_blocks=8)
    start, long = list(prompts()[6]), list(prompts()[10])
    said = alone(tuple(start), False)
    follow_up = [*start, *said[:NEW], 5, 6, 7]

    def ask(manager: Any, prompt: list[int]) -> list[int]:
        name = manager.add_request(prompt, max_new_tokens=NEW)
        result = results(manager, {name})[name]
        assert result.error is None
        return list(result.generated_tokens)

    answers = []
    for before in ([start], [long, long[::-1], start]):
        with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
            for prompt in before:
                ask(manager, prompt)
            hits = manager.stats()["prefix_tokens"]
            answers.append(ask(manager, follow_up))
            assert manager.stats()["prefix_tokens"] - hits >= 20
    assert answers[0] == answers[1]


def test_a_prefix_of_exact_blocks_changes_nothing() -> None:
    enable_batching(model(), exact=True, **EXACT)
    config = engine(allow_block_sharing=True, max_requests_per_batch=1)
    both = [list(prompts()[11]), list(prompts()[12]), list(prompts()[13])]
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        for prompt in both:
            name = manager.add_request(prompt, max_new_tokens=NEW)
            assert results(manager, {name})[name].generated_tokens == alone(tuple(prompt), True)
        assert manager.stats()["prefix_tokens"] > 100


def test_a_shared_page_is_never_written_again() -> None:
    """Two requests that share all pages go on differently; a third one finds the pages as they were."""
    enable_batching(model(), **CODED)
    config = engine(allow_block_sharing=True, max_requests_per_batch=3)
    first = list(prompts()[11])
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        names = [manager.add_request(first, max_new_tokens=2)]
        results(manager, set(names))
        pool = manager.batch_processor.cache.cache_tensor
        before = pool.clone()
        tails = [[5] * 30, [6] * 30, []]
        names = [manager.add_request([*first, *tail], max_new_tokens=NEW) for tail in tails]
        found = results(manager, set(names))
        assert all(r.error is None for r in found.values())
        size = manager.stats()["blocks"]["bytes"]
        written = (before.view(-1, size) != 0).any(dim=1)
        assert written.sum() >= 6
        assert torch.equal(pool.view(-1, size)[written], before.view(-1, size)[written])


def test_a_request_longer_than_the_pool_fails_at_once_and_alone() -> None:
    enable_batching(model(), **CODED)
    with model().continuous_batching_context_manager(
        greedy(), continuous_batching_config=engine(num_blocks=4, max_requests_per_batch=2)
    ) as manager:
        long = manager.add_request(list(prompts()[11]), max_new_tokens=NEW)
        empty = manager.add_request([], max_new_tokens=NEW)
        short = manager.add_request(list(prompts()[5]), max_new_tokens=NEW)
        found = results(manager, {long, short, empty})
        assert "PQC001" in found[long].error
        assert "empty" in found[empty].error
        assert found[short].generated_tokens == alone(prompts()[5], False)


def test_a_request_without_end_fails_alone_once_it_has_outgrown_the_pool() -> None:
    enable_batching(model(), **CODED)
    endless = greedy()
    endless.max_new_tokens = None
    with model().continuous_batching_context_manager(
        endless, continuous_batching_config=engine(num_blocks=4, max_requests_per_batch=2)
    ) as manager:
        name = manager.add_request(list(prompts()[3]), max_new_tokens=None)
        found = results(manager, {name})
        assert "PQC001" in found[name].error
        assert len(found[name].generated_tokens) > 60
        short = manager.add_request(list(prompts()[5]), max_new_tokens=NEW)
        assert results(manager, {short})[short].generated_tokens == alone(prompts()[5], False)


def test_a_prompt_too_long_to_wait_is_stored_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pqcache.batching.sizes.STAGING_SHARE", 0.0)
    enable_batching(model(), **CODED)
    with model().continuous_batching_context_manager(
        greedy(), continuous_batching_config=engine(max_batch_tokens=32)
    ) as manager:
        name = manager.add_request(list(prompts()[11]), max_new_tokens=NEW)
        assert results(manager, {name})[name].error is None
        assert manager.stats()["cut_prompts"] == 1


def test_generate_is_as_it_was_before_between_and_after() -> None:
    plain = alone(prompts()[6], False)
    enable_batching(model(), **CODED)
    assert is_enabled(model())
    alone.cache_clear()
    assert alone(prompts()[6], False) == plain
    model().generate_batch([list(prompts()[6])], greedy(), engine())
    alone.cache_clear()
    assert alone(prompts()[6], False) == plain
    disable_batching(model())
    assert not is_enabled(model())
    exact = model().generate_batch([list(prompts()[6])], greedy(), tf.ContinuousBatchingConfig(num_blocks=8))
    assert next(iter(exact.values())).error is None


def test_a_kept_manager_serves_again() -> None:
    enable_batching(model(), **CODED)
    for _ in range(2):
        found = model().generate_batch([list(prompts()[6])], greedy(), engine(), persistent_manager=True)
        assert next(iter(found.values())).generated_tokens == alone(prompts()[6], False)
    model().destroy_cached_continuous_batching_manager()


@pytest.mark.slow
def test_a_compiled_step_is_the_same() -> None:
    enable_batching(model(), **CODED)
    config = engine(decode_compile_config=tf.CompileConfig(backend="eager", fullgraph=False, mode=None))
    few = [list(prompts()[i]) for i in (3, 9)]
    found = model().generate_batch(few, greedy(), config)
    assert [r.generated_tokens for r in found.values()] == [alone(tuple(p), False) for p in few]


def test_samples_are_those_of_their_own_settings() -> None:
    """A request with top_k=1 is greedy, beside one that is not."""
    enable_batching(model(), **CODED)
    sampled = GenerationConfig(max_new_tokens=NEW, do_sample=True, eos_token_id=-1, top_k=50)
    config = engine(per_request_processors=True, max_requests_per_batch=4)
    with model().continuous_batching_context_manager(sampled, continuous_batching_config=config) as manager:
        plain = manager.add_request(list(prompts()[6]), max_new_tokens=NEW, top_k=1)
        other = manager.add_request(list(prompts()[6]), max_new_tokens=NEW, top_k=50)
        found = results(manager, {plain, other})
        assert found[plain].generated_tokens == alone(prompts()[6], False)
        assert found[other].generated_tokens != found[plain].generated_tokens


def test_lora_is_served() -> None:
    """A wrapper that passes calls on, and weights that it has put into the model."""
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(model())  # LoRA puts its weights into it
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    ids = torch.tensor([list(prompts()[9])])
    made = PagedPQCache(base.config, **CODED)
    want = wrapped.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **cache_kwargs(made))[0, ids.shape[1] :]
    assert enable_batching(wrapped, **CODED) is wrapped
    found = wrapped.generate_batch(ids.tolist(), greedy(), engine())
    assert next(iter(found.values())).generated_tokens == want.tolist()
    disable_batching(wrapped)
    assert not is_enabled(base)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral_sliding", "sliding"),
        ("gpt_oss", "sliding"),
        ("falcon", "computes with keys"),
    ],
)
def test_models_that_do_not_fit_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        enable_batching(tiny_models.build(name))


def test_a_call_of_the_model_while_the_engine_runs_is_refused() -> None:
    enable_batching(model(), **CODED)
    with (
        model().continuous_batching_context_manager(greedy(), continuous_batching_config=engine()),
        pytest.raises(RuntimeError, match="continuous batching"),
    ):
        model()(torch.tensor([[1, 2, 3]]))


def test_too_little_memory_is_refused_with_the_bytes() -> None:
    enable_batching(model(), **CODED)
    config = engine(num_blocks=1 << 40)
    with pytest.raises(MemoryError, match=r"PQC004.*MiB"):
        model().init_continuous_batching(greedy(), config)._create_batch_processor()
    alone.cache_clear()
    assert alone(prompts()[6], False), "generate is as it was"
