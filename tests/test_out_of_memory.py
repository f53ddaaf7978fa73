"""Memory runs out at every single allocation in turn: the error is PQC004, the cache is as it was, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.attention import ops
from hf_pqcache.codebook import shipped
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.pages import slabs

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    head_dim=HEAD_DIM,
    vocab_size=64,
    max_position_embeddings=512,
)


class OutOfMemory(TorchDispatchMode):
    """Refuses the allocation number `at`, counted from 0, and `lasting` ones all that follow."""

    def __init__(self, at: int, lasting: bool) -> None:
        super().__init__()
        self.at, self.lasting, self.count = at, lasting, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hf_pqcache":
            with self:  # look inside
                return ops.IMPLEMENTATIONS[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in func._schema.returns):
            self.count += 1
            if self.count > self.at and (self.lasting or self.count == self.at + 1):
                raise torch.OutOfMemoryError("no memory left, says the test")
        return func(*args, **(kwargs or {}))


BOOK = shipped.codebook(PQConfig(num_bits=4), HEAD_DIM, HEAD_DIM)


def make(kind: str) -> Any:
    if kind == "exact":
        return PagedKVCache(CONFIG, page_size=16, max_pages=60)
    options: dict[str, Any] = {"page_size": 16, "max_pages": 60, "sink_tokens": 2, "extended_residual": 8}
    options["offload"] = kind == "offloaded"
    return PagedPQCache(CONFIG, BOOK, **options)


@cache  # made before memory runs out
def tokens(batch: int, count: int, seed: int) -> Tensor:
    return torch.randn(LAYERS, 2, batch, HEADS, count, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def forward(kv: Any, batch: int, count: int, seed: int) -> None:
    for layer, (k, v) in enumerate(tokens(batch, count, seed)):
        kv.update(k, v, layer)
        kv.layers[layer].commit()


def contents(kv: Any) -> list[Tensor]:
    """Everything a user can read of a cache."""
    if kv.sequence_ids:
        return [x for name in kv.sequence_ids for layer in range(LAYERS) for x in kv.get_kv(name, layer)]
    if not kv.get_seq_length():
        return []
    return [x for layer in kv.layers for x in (layer.keys, layer.values)]


def sequences(kv: Any) -> None:
    for name in "ab":
        kv.allocate_sequence(name)
        for layer, (k, v) in enumerate(tokens(1, 70, ord(name))):
            kv.append_tokens(name, layer, k, v)


def append_to_a(kv: Any) -> None:
    for layer, (k, v) in enumerate(tokens(1, 30, 9)):
        if kv.storage.lengths.seq_lens(layer)[0] == 70:
            kv.append_tokens("a", layer, k, v)


def almost_a_page(kv: Any) -> None:
    forward(kv, 2, 60, 1)
    config = kv.storage.layers.config
    forward(kv, 2, 4 if isinstance(kv, PagedKVCache) else 13, 2)
    assert config.coded_tokens(kv.get_seq_length()) < config.coded_tokens(kv.get_seq_length() + 1)


Action = Callable[[Any], Any]
PROMPT: Action = lambda kv: forward(kv, 2, 60, 1)  # noqa: E731
SCENES: dict[str, tuple[Action, Action]] = {
    "first prompt": (lambda kv: None, PROMPT),
    "step that fills a page": (almost_a_page, lambda kv: forward(kv, 2, 1, 3)),
    "second prompt": (PROMPT, lambda kv: forward(kv, 2, 50, 4)),
    "crop": (PROMPT, lambda kv: kv.crop(-25)),
    "reorder": (PROMPT, lambda kv: kv.reorder_cache(torch.tensor([1, 0]))),
    "repeat": (PROMPT, lambda kv: kv.batch_repeat_interleave(2)),
    "append": (sequences, append_to_a),
    "fork": (sequences, lambda kv: kv.fork_sequence("a", "c")),
    "crop a sequence": (sequences, lambda kv: kv.crop_sequence("a", 40)),
}


#: Coding makes hundreds of tensors: every fourth of them by default, all of them, and the scene with most, by hand.
EVERY = {"exact": 1, "codes": 4, "offloaded": 4}
CASES = [(kind, scene, EVERY[kind]) for kind in ("exact", "codes") for scene in SCENES]
CASES += [("offloaded", scene, EVERY["offloaded"]) for scene in ("step that fills a page", "append")]
ALL = [pytest.param(kind, scene, 1, marks=pytest.mark.slow) for kind, scene, every in CASES if every > 1]


@pytest.mark.parametrize(("kind", "scene", "every"), [c for c in CASES if c[:2] != ("codes", "second prompt")] + ALL)
@pytest.mark.parametrize("lasting", [False, True])
def test_out_of_memory_at_an_allocation(kind: str, scene: str, every: int, lasting: bool) -> None:
    prepare, action = SCENES[scene]
    whole = make(kind)
    prepare(whole)
    before = contents(whole)
    used, length = whole.stats()["pages_used"], whole.get_seq_length()
    action(whole)
    after = contents(whole)
    for at in range(every // 2 if lasting else 0, 10_000, every):
        kv = make(kind)
        prepare(kv)
        memory = OutOfMemory(at, lasting)
        try:
            with memory:
                action(kv)
        except CacheOutOfMemoryError:
            pass
        else:
            if memory.count <= at:
                break
            assert not lasting, "an allocation failed and nobody noticed"
            assert all(map(torch.equal, contents(kv), after))  # less memory did as well
            continue
        if scene == "append":  # layer by layer: those before the failure have their tokens
            action(kv)
        else:
            assert kv.get_seq_length() == length
            is_unchanged = kind == "exact" or scene != "second prompt"
            if not lasting:
                assert kv.stats()["pages_used"] == used
                # Several tokens at once may crowd exact ones out of the windows of the layers before the failure.
                assert not is_unchanged or all(map(torch.equal, contents(kv), before))
            action(kv)
            assert not is_unchanged or all(map(torch.equal, contents(kv), after))
        assert len(contents(kv)) == len(after)
    else:
        pytest.fail("the action never came to its end")
    allocates_nothing = scene == "fork"
    assert at > 0 or allocates_nothing


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("kind", ["exact", "codes"])
@pytest.mark.parametrize("count", [1, 9])
def test_out_of_memory_anywhere_in_a_forward_pass(kind: str, count: int, lasting: bool) -> None:
    """Also in the model's own code, which the cache does not see: the next pass finds the positions before the step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").eval()
    prompt, step = torch.randint(0, 64, (2, 50)), torch.randint(0, 64, (2, count))

    def run(kv: Any) -> Tensor:
        with torch.no_grad():
            return model(step, **cache_kwargs(kv)).logits

    def started(kv: Any) -> Any:
        with torch.no_grad():
            model(prompt, **cache_kwargs(kv))
        return kv

    expected, plain = run(started(make(kind))), run(started(DynamicCache(config=CONFIG)))
    if kind == "exact":
        torch.testing.assert_close(expected, plain)
    failures = 0
    for at in range(0, 10_000, 29 if (kind, count) == ("codes", 9) else 11):
        kv = started(make(kind))
        memory = OutOfMemory(at, lasting)
        try:
            with memory:
                run(kv)
            break
        except (CacheOutOfMemoryError, torch.OutOfMemoryError):
            failures += 1
        if kv.get_seq_length() == 50 + count:  # every layer had its tokens already
            kv.crop(-count)
        assert kv.get_seq_length() == 50
        got = run(kv)
        assert kv.get_seq_length() == 50 + count
        if kind == "exact" or count == 1:
            torch.testing.assert_close(got, expected)
        else:  # a few exact tokens may have become codes
            assert (got - expected).norm() < 0.2 * expected.norm()
    assert failures > 10


def test_more_tokens_than_any_machine_holds() -> None:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=64, head_dim=256)
    kv = PagedKVCache(config, page_size=512, max_pages=1 << 21, expected_tokens=1 << 29)
    k = torch.zeros(1, 64, 1, 256)
    kv.allocate_sequence("a")
    kv.append_tokens("a", 0, k[0], k[0])
    with pytest.raises(CacheOutOfMemoryError, match=r"PQC004.*use fewer bits or sequences"):
        kv.append_tokens("a", 0, k[0].expand(64, 1 << 29, 256), k[0].expand(64, 1 << 29, 256))
    assert kv.sequence_stats("a")["tokens"] == 1
    kv.append_tokens("a", 0, k[0], k[0])
    with pytest.raises(ValueError, match=r"more than 2147483647 tokens.*use max_pages=4194303 or less"):
        PagedKVCache(config, page_size=512, max_pages=1 << 22)


@pytest.mark.parametrize("offload", [False, True])
def test_more_than_the_machine_has_is_refused_before_it_is_written(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux may promise memory that there is not, and end the process that takes it."""
    kv = PagedKVCache(CONFIG, page_size=16, max_pages=60, offload=offload)
    forward(kv, 1, 40, 1)
    monkeypatch.setattr(slabs.psutil, "virtual_memory", lambda: SimpleNamespace(total=100))
    monkeypatch.setattr(slabs.psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    with pytest.raises(CacheOutOfMemoryError, match=r"PQC004.*bytes are more than the 100 of this machine"):
        forward(kv, 1, 600, 2)
    assert kv.get_seq_length() == 40
