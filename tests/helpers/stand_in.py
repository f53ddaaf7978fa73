"""A pytest plugin for transformers' own tests: one of our caches wherever they would make a DynamicCache; knows no model.

In a checkout of transformers of the installed version, with this folder on PYTHONPATH:

    pytest -p stand_in --stand-in dynamic --record dynamic.pt tests/models/llama
    pytest -p stand_in --stand-in paged --record paged.pt tests/models/llama
    python stand_in.py dynamic.pt paged.pt

The last line prints every test whose outcome or whose results of `generate` differ. See TRANSFORMERS.md for what does.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import utils as generation

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.shapes import kv_shape, layer_configs


def in_window(config: Any) -> PagedPQCache:
    """A cache that codes nothing yet. Heads of 8 numbers, as the tests' models have, are cut as finely as can be."""
    head_dim = kv_shape(layer_configs(config.get_text_config(decoder=True))[0])[1]
    return PagedPQCache(config, page_size=16, extended_residual=4096, num_subspaces=8 if head_dim == 8 else None)


#: Pages so small that a few dozen tokens pass their borders.
MAKERS: dict[str, Callable[[Any], Any]] = {"paged": lambda config: PagedKVCache(config, page_size=16), "pq": in_window}
TOLERANCE = 1e-4
_SEED = 1234


class StandIn(type):
    """The class of a name that stands where `DynamicCache` stood: makes our cache where a config says for which model."""

    maker: Callable[[Any], Any]
    made: ClassVar[list[Any]] = []

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if args or options.keys() != {"config"} or options["config"] is None:
            return DynamicCache(*args, **options)
        StandIn.made.append(StandIn.maker(options["config"]))
        return StandIn.made[-1]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, DynamicCache)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, DynamicCache)


def _replace(stand_in: type) -> None:
    """Put the stand-in under the name `DynamicCache` of every module but the one that defines it."""
    for name, module in list(sys.modules.items()):
        is_theirs = name.startswith(("transformers.", "tests.")) and name != DynamicCache.__module__
        if is_theirs and vars(module).get("DynamicCache") is DynamicCache:
            module.DynamicCache = stand_in  # type: ignore[attr-defined]


class Recorder:
    """Outcome of every test, and what each outermost `generate` in it returned."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.current: list[dict[str, Tensor]] = []
        self._depth = 0
        generation.GenerationMixin.generate = self._recording(generation.GenerationMixin.generate)  # type: ignore[method-assign]

    def _recording(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                out = generate(*args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:
                self.current.append(_tensors(out))
            return out

        return recorded

    def note(self, test: str, report: Any) -> None:
        """Keep the worst outcome of a test and of its subtests, and why."""
        entry = self.tests.setdefault(test, {"outcome": report.outcome, "why": [], "outputs": [], "made": 0})
        if report.outcome != "passed":
            entry["outcome"] = "failed" if entry["outcome"] == "failed" else report.outcome
            entry["why"].append(str(report.longrepr)[-4000:])


def _tensors(out: Any) -> dict[str, Tensor]:
    if isinstance(out, Tensor):
        return {"sequences": out.detach().cpu()}
    found = {name: getattr(out, name, None) for name in ("sequences", "scores", "logits")}
    stacked = {k: torch.stack([t.float() for t in v]) if isinstance(v, tuple) and v else v for k, v in found.items()}
    return {k: v.detach().cpu() for k, v in stacked.items() if isinstance(v, Tensor)}


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("stand_in")
    group.addoption("--stand-in", choices=["dynamic", *MAKERS], default="dynamic", help="the cache in DynamicCache's place")
    group.addoption("--record", help="file for outcomes and results")


def pytest_configure(config: Any) -> None:
    config._recorder = Recorder()
    if config.getoption("stand_in") != "dynamic":
        StandIn.maker = MAKERS[config.getoption("stand_in")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """The same random numbers in every run, and the stand-in in modules that were imported meanwhile."""
    transformers.set_seed(_SEED)
    for module in list(sys.modules.values()):
        if isinstance(rng := getattr(module, "global_rng", None), random.Random):
            rng.seed(_SEED)
    item.config._recorder.current = []
    StandIn.made.clear()
    if item.config.getoption("stand_in") != "dynamic":
        _replace(StandIn("DynamicCache", (), {}))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    report = yield
    recorder = item.config._recorder
    if report.when == "call" or report.outcome != "passed":
        recorder.note(item.nodeid, report)
        recorder.tests[item.nodeid].update(
            outputs=recorder.current, made=sum(bool(cache.stats()["compressed_layers"]) for cache in StandIn.made)
        )
    return report


def pytest_sessionfinish(session: Any) -> None:
    if path := session.config.getoption("record"):
        torch.save(session.config._recorder.tests, path)


def distance(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> float | str:
    """Largest distance of two lists of results, or what makes them incomparable."""
    if len(a) != len(b):
        return f"{len(a)} results against {len(b)}"
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        for name in one.keys() & other.keys():
            x, y = one[name], other[name]
            if x.shape != y.shape:
                return f"{name} {tuple(x.shape)} against {tuple(y.shape)}"
            if name == "sequences" and not torch.equal(x, y):
                return "other tokens"
            gap = (x.float() - y.float()).nan_to_num(0, 0, 0).abs()  # two equal infinities
            worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def main(paths: list[str]) -> None:
    """Print what differs between two recorded runs, and how much there was to differ."""
    first, second = (torch.load(path) for path in paths)
    both = sorted(first.keys() & second.keys())
    for test in both:
        a, b = first[test], second[test]
        gap = distance(a["outputs"], b["outputs"])
        if a["outcome"] != b["outcome"]:
            lines = "\n".join(b["why"] or a["why"]).strip().splitlines() or ["no reason given"]
            error = next((line for line in reversed(lines) if line.startswith("E  ")), lines[-1])
            print(f"{test}: {a['outcome']} -> {b['outcome']}: {error.removeprefix('E').strip()}")
        elif isinstance(gap, str) or gap > TOLERANCE:
            print(f"{test}: {a['outcome']}, but {gap}")
    made, compared = (sum(bool(second[test][key]) for test in both) for key in ("made", "outputs"))
    print(
        f"{len(both)} tests in both runs; {made} kept tokens in pages; {compared} have results of generate, which are compared"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
