"""Each row of a batch chooses as its request asks: what transformers' processors leave, by draws of the row's own seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from hf_pqcache.serve.sampling import Sampler, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 50


def request(sampling: Sampling | None, prompt: list[int], generated: int = 0, true_prompt: int = 0) -> Any:
    """As the engine has one whose next step gives token number `generated`."""
    kwargs = {} if sampling is None else {"sampling": sampling}
    state = SimpleNamespace(
        initial_tokens=prompt,
        _true_initial_tokens=true_prompt,
        position_offset=len(prompt) + generated,
        logit_processor_kwargs=kwargs,
    )
    return SimpleNamespace(state=state, has_new_token=True)


def step(sampler: Sampler, requests: list[Any], last: list[int], scores: Tensor) -> Tensor:
    """Scores after the sampler, with two columns of padding in its table; whoever needs a slot gets one before."""
    for one in requests:
        sampling = one.state.logit_processor_kwargs.get("sampling")
        if sampling is not None and sampling.has_history and sampling.slot is None:
            sampler.take(sampling)
    table = torch.full((sampler.tensors_required, len(requests) + 2), 7, dtype=torch.int32)
    sampler.prepare_tensor_args(requests, table)
    return sampler(torch.tensor(last, dtype=torch.int32), scores.clone(), table[:, : len(requests)])


def draws(sampling: Sampling, scores: Tensor, count: int) -> Tensor:
    """Tokens of `count` seeds."""
    sampler = Sampler(VOCAB, 4, torch.device("cpu"))
    rows = [Sampling(**{**vars_of(sampling), "seed": seed}) for seed in range(count)]
    return step(sampler, [request(row, [1]) for row in rows], [1] * count, scores.expand(count, -1)).argmax(-1)


def vars_of(sampling: Sampling) -> dict[str, Any]:
    return {name: value for name, value in vars(sampling).items() if name not in ("slot",)}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.1, 2),
    st.integers(0, 60),
    st.sampled_from([0, 0.3, 0.9, 1]),
    st.sampled_from([0, 0.05, 1]),
)
def test_what_is_left_is_what_transformers_leaves(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    left = scores / temperature
    for warper in [
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if 0 < top_p < 1 else []),
        *([MinPLogitsWarper(min_p)] if min_p else []),
    ]:
        left = warper(torch.zeros(1, 1, dtype=torch.long), left)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    found = step(Sampler(VOCAB, 1, torch.device("cpu")), [request(sampling, [1])], [1], scores)
    allowed = left.isfinite() if top_p else left == left.max()
    assert torch.equal(found.isfinite(), allowed)


def test_draws_follow_the_probabilities() -> None:
    scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    count = 20000
    counts = draws(Sampling(temperature=0.7), scores, count).bincount(minlength=VOCAB).double()
    expected = (scores[0].double() / 0.7).softmax(-1) * count
    often = expected > 5
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi < often.sum() + 5 * (2 * often.sum()) ** 0.5


def test_steps_draw_anew_and_seeds_of_64_bits_differ() -> None:
    scores = torch.zeros(1, VOCAB)
    sampler = Sampler(VOCAB, 1, torch.device("cpu"))
    seen = set()
    for seed in (1, 2, 1 + 2**32, 1 + 2**63):
        sampling = Sampling(seed=seed)
        seen |= {(int(step(sampler, [request(sampling, [1], n)], [1], scores).argmax()), seed, n) for n in range(8)}
    sequences = {seed: tuple(token for token, s, n in sorted(seen, key=lambda x: x[2]) if s == seed) for _, seed, _ in seen}
    assert len(set(sequences.values())) == 4
    assert all(len(set(tokens)) > 2 for tokens in sequences.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(0, 2**31), st.data())
def test_company_changes_nothing(rows: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, VOCAB, generator=generator)
    kinds = [
        Sampling(temperature=0.0),
        Sampling(seed=seed),
        Sampling(seed=seed, top_p=0.5, top_k=7),
        Sampling(temperature=0.0, repetition_penalty=1.5),
        Sampling(presence_penalty=1.0, min_tokens=3, ends=(4,)),
    ]
    chosen = [data.draw(st.sampled_from(kinds)) for _ in range(rows)]
    prompts = [torch.randint(VOCAB, (5,), generator=generator).tolist() for _ in range(rows)]

    def tokens(rows: list[int]) -> list[int]:
        sampler = Sampler(VOCAB, len(chosen), torch.device("cpu"))
        requests = [request(Sampling(**vars_of(chosen[row])), prompts[row]) for row in rows]
        return [int(x) for x in step(sampler, requests, [prompts[row][-1] for row in rows], scores[rows]).argmax(-1)]

    together = tokens(list(range(rows)))
    assert together == [tokens([row])[0] for row in range(rows)]
    greedy = [row for row in range(rows) if chosen[row] is kinds[0]]
    assert [together[row] for row in greedy] == scores[greedy].argmax(-1).tolist()


@pytest.mark.parametrize("begins_anew", [False, True], ids=["", "begun anew"])
def test_penalties_know_the_prompt_and_what_was_generated(begins_anew: bool) -> None:
    """Also when the engine has thrown out the request and computes prompt and answer again."""
    scores = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(VOCAB, 2, torch.device("cpu"))
    sampling = Sampling(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, min_tokens=5, ends=(9,)
    )
    prompt, answer = [1, 2, 3, 2], [5, 5, 2, 7, 5]
    for n in range(6):
        anew = begins_anew and n >= 3
        known = prompt + answer[:3] if anew else prompt
        future = request(sampling, known, n - 3 if anew else n, len(prompt) if anew else 0)
        found = step(sampler, [future], [(prompt + answer)[len(prompt) + n - 1]], scores[n : n + 1])
        text = torch.tensor([prompt + answer[:n]])
        want = RepetitionPenaltyLogitsProcessor(1.3)(text, scores[n : n + 1].clone())
        counts = torch.tensor(answer[:n], dtype=torch.long).bincount(minlength=VOCAB)
        want = want - 0.2 * counts - 0.4 * (counts > 0)
        if n < 5:
            want[:, 9] = -torch.inf
        torch.testing.assert_close(found, want)


def test_slots_come_back() -> None:
    sampler = Sampler(VOCAB, 2, torch.device("cpu"))
    scores = torch.zeros(1, VOCAB)
    for _ in range(5):
        sampling = Sampling(repetition_penalty=2.0)
        step(sampler, [request(sampling, [1, 2])], [2], scores)
        assert len(sampler.free) == 1
        sampler.release(sampling)
        sampler.release(sampling)
        step(sampler, [request(sampling, [1, 2])], [2], scores)  # a step that was under way when it was cancelled
        assert sorted(sampler.free) == [0, 1]


def test_foreign_arguments_are_refused() -> None:
    sampler = Sampler(VOCAB, 2, torch.device("cpu"))
    sampler.check_kwargs({"sampling": Sampling()})
    with pytest.raises(TypeError, match="temperature"):
        sampler.check_kwargs({"temperature": 1.0})
