"""Every causal LM of transformers, tiny and random, against DynamicCache: the slow test that the default run leaves out.

Its name is none that pytest collects by itself. Some minutes on one core, and a table at the end of what ran how:

    OMP_NUM_THREADS=1 pytest tests/sweep.py
    OMP_NUM_THREADS=1 pytest tests/sweep.py -k "llama or gemma"

A model that transformers itself cannot build, or not run with a DynamicCache, is skipped, and the table says why. All
others must give DynamicCache's tokens and logits, whether their attention is fused, decoded or exact, and whether steps are
compiled (here into graphs that run as they are) or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from graphs import Graphs
from tiny_models import padded, tokens
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
PROMPT, NEW, MORE = 50, 14, 5
#: Pages of 16 tokens: the prompt fills three, and steps fill another. The window of the second cache holds all of them.
OURS: dict[str, Callable[[Any], Any]] = {
    "PagedKVCache": lambda config: PagedKVCache(config, page_size=16),
    "PagedPQCache": lambda config: PagedPQCache(config, page_size=16, extended_residual=128),
}


class Table:
    """What became of each model and attention implementation; printed when all tests are done."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], str] = {}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("sweep")
        for (name, implementation), row in self.rows.items():
            terminalreporter.write_line(f"{name:26} {implementation:6} {row}")
        kinds = [row.split(":")[0] for row in self.rows.values()]
        terminalreporter.write_line(", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Table:
    table = Table()
    request.config.pluginmanager.register(table)
    return table


def generate(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits of every step."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **cache_kwargs(cache), **settings, **options)
    return out.sequences, torch.stack(out.logits)


def go_on(model: Any, cache: Any, mask: Tensor) -> Tensor:
    """Logits of several more tokens passed at once, and of one more."""
    total, logits = cache.get_seq_length(), []
    for count in (MORE, 1):
        total += count
        seen = torch.nn.functional.pad(mask, (0, total - mask.shape[1]), value=1)
        logits.append(model(tokens(2, count, seed=count), attention_mask=seen, **cache_kwargs(cache, model)).logits)
    return torch.cat(logits, dim=1)


def is_used(cache: Any) -> bool:
    """Whether a model has put anything into a DynamicCache."""
    states = [any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers]
    return any(states) or any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def attempt(call: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """(result, "") or (None, why there is none)."""
    try:
        return call(*args), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def how(cache: Any) -> str:
    """By what attended: fused, decoded, or exact where no layer is compressed."""
    stats = cache.stats()
    if not stats["compressed_layers"]:
        return "exact"
    return "fused" if stats["calls"].get("attend/torch") else "decoded"


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_as_dynamic_cache(name: str, implementation: str, table: Table) -> None:
    def skip(why: str) -> None:
        table.rows[name, implementation] = f"skipped: {why}"
        pytest.skip(why)

    table.rows[name, implementation] = "FAILED"
    model, error = attempt(zoo.build, name, implementation)
    if error:
        skip(f"cannot be built: {error}")
    kinds, notes = set(), set()
    for inputs in ({"input_ids": tokens(2, PROMPT)}, padded(2, PROMPT)[0]):
        inputs.setdefault("attention_mask", torch.ones(2, PROMPT, dtype=torch.long))
        stock, error = attempt(lambda: DynamicCache(config=model.config))
        expected, error = (None, error) if error else attempt(generate, model, stock, inputs)
        if error:
            skip(f"with DynamicCache: {error}")
        if not is_used(stock):
            skip("it keeps nothing in the cache that it is given")
        more, error = attempt(go_on, model, stock, inputs["attention_mask"])
        notes |= {f": but for going on, {error}"} if error else set()
        for make in OURS.values():
            cache = make(model.config)
            got = generate(model, cache, inputs)
            torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
            assert torch.equal(got[0], expected[0])
            kinds.add(how(cache))
            if more is not None:
                torch.testing.assert_close(go_on(model, cache, inputs["attention_mask"]), more, rtol=1e-4, atol=1e-4)
                assert cache.get_seq_length() == stock.get_seq_length()
    table.rows[name, implementation] = " and ".join(sorted(kinds)) + "".join(sorted(notes))


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.NAMES)
def test_compiled_steps_as_dynamic_cache(name: str, table: Table) -> None:
    model, error = attempt(zoo.build, name, "sdpa")
    model, error = attempt(zoo.build, name, "eager") if error else (model, "")
    inputs = padded(2, PROMPT)[0]
    expected, error = (None, error) if error else attempt(lambda: generate(model, DynamicCache(config=model.config), inputs))
    if error:
        pytest.skip(error)
    cache, graphs = PagedKVCache(model.config, page_size=16, compile=True), Graphs()
    if not cache.is_compileable:
        pytest.skip(cache.stats()["eager_because"])
    table.rows[name, "graphs"] = "FAILED"
    torch._dynamo.reset()
    config = graphs.config
    config.fullgraph = False  # a model's own code may break the graph
    got = generate(model, cache, inputs, compile_config=config)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0], expected[0])
    table.rows[name, "graphs"] = f"{how(cache)}: in {graphs.count} graphs"
