"""The device is divided by one split into disjoint parts, and every call of the driver that fails leaves a plain stream."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_pqcache.batching import streams
from hf_pqcache.batching.lanes import Inline, StreamLane
from hf_pqcache.batching.streams import Partition

DEVICE = torch.device("cuda", 0)
CALLS = [
    "cuDeviceGet",
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxStreamCreate",
]


class FakeDriver(ModuleType):
    """A driver whose multiprocessors have numbers: a resource is `owned`, a set of them.

    Args:
        total, unit: of the device. fails: the call that answers with an error, at its n-th time.
    """

    def __init__(self, total: int = 132, unit: int = 8, fails: str | None = None, at: int = 0) -> None:
        super().__init__("cuda.bindings.driver")
        self.total, self.unit, self.fails, self.at = total, unit, fails, at
        self.calls: list[str] = []
        self.described: list[set[int]] = []
        self.destroyed: list[int] = []
        self.CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
        self.CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        for name in CALLS:
            setattr(self, name, self._called(name, getattr(self, f"_{name}")))

    def _called(self, name: str, act: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name == self.fails and self.calls.count(name) > self.at:
                return 801, *[None] * len(act(*arguments))
            return 0, *act(*arguments)

        return call

    def _resource(self, owned: set[int]) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(owned), smCoscheduledAlignment=self.unit), owned=owned)

    def _cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return (ordinal,)

    def _cuDeviceGetDevResource(self, device: Any, kind: int) -> tuple[Any, ...]:
        return (self._resource(set(range(self.total))),)

    def _cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, count: int) -> tuple[Any, ...]:
        size, free = -(-count // self.unit) * self.unit, sorted(whole.owned)
        groups = min(groups, len(free) // size)
        parts = [self._resource(set(free[i * size : (i + 1) * size])) for i in range(groups)]
        return parts, groups, self._resource(set(free[groups * size :]))

    def _cuDevResourceGenerateDesc(self, parts: list[Any], number: int) -> tuple[Any, ...]:
        assert number == len(parts)
        self.described.append(set().union(*(part.owned for part in parts)))
        return (len(self.described),)

    def _cuGreenCtxCreate(self, description: int, device: Any, flags: int) -> tuple[Any, ...]:
        return (100 + description,)

    def _cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[Any, ...]:
        return (1000 + context,)

    def cuGreenCtxDestroy(self, context: int) -> tuple[Any, ...]:
        self.destroyed.append(context)
        return (0,)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: ("external", address))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "plain")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def make(driver: Any, monkeypatch: pytest.MonkeyPatch, partition: Partition | None = None) -> streams.Streams:
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return streams.make("partition", partition, DEVICE, is_parallel=False)


def test_sixteen_multiprocessors_for_compression_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    made = make(driver, monkeypatch)
    assert driver.calls == CALLS
    assert driver.described == [set(range(16))]
    assert made.stats() == {
        "greenctx_available": True,
        "greenctx_reason": "",
        "sm_counts": {"device": 132, "compress": 16, "main": 132},
    }
    assert isinstance(made.lane, StreamLane)
    assert made.lane.stream == ("external", 1101)
    assert made.main is None
    assert made.keep == [101]


def test_steps_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    made = make(driver, monkeypatch, Partition(compress_ratio=0.25, main_stream=True))
    assert driver.calls.count("cuDevSmResourceSplitByCount") == 1
    assert made.sm_counts == {"device": 132, "compress": 40, "main": 92}  # 33 are rounded up to whole parts
    assert (made.lane.stream, made.main) == (("external", 1101), ("external", 1102))  # type: ignore[attr-defined]


@given(st.integers(16, 160), st.sampled_from([2, 4, 8]), st.none() | st.floats(0.01, 0.5), st.none() | st.floats(0.01, 0.5))
def test_parts_are_disjoint_and_of_one_split(total: int, unit: int, compress: float | None, main: float | None) -> None:
    driver = FakeDriver(total, unit)
    try:
        made = streams.divide(DEVICE, Partition(compress, main, main_stream=True), driver)
    except streams._DriverError as error:
        assert "leave nothing" in str(error)  # noqa: PT017
        return
    first, second = driver.described
    assert not first & second
    assert driver.calls.count("cuDevSmResourceSplitByCount") == 1
    assert made.sm_counts == {"device": total, "compress": len(first), "main": len(second)}
    assert len(first) % unit == 0
    assert len(first) >= (16 if compress is None else int(compress * total))
    if main is not None:
        assert len(second) >= min(total - len(first) - total % unit, int(main * total))


@pytest.mark.parametrize(
    ("name", "at"), [*((name, 0) for name in CALLS), ("cuGreenCtxCreate", 1), ("cuGreenCtxStreamCreate", 1)]
)
def test_each_call_that_fails_leaves_a_plain_stream(name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(fails=name, at=at)
    made = make(driver, monkeypatch, Partition(main_stream=True))
    assert made.lane.stream == "plain"  # type: ignore[attr-defined]
    assert made.main is None
    assert made.stats() == {"greenctx_available": False, "greenctx_reason": f"{name} answered 801", "sm_counts": {}}
    assert len(driver.destroyed) == driver.calls.count("cuGreenCtxCreate") - (name == "cuGreenCtxCreate")


def test_bindings_that_are_old_or_raise_leave_a_plain_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    del driver.cuGreenCtxCreate
    assert "cuda-bindings has no cuGreenCtxCreate" in make(driver, monkeypatch).reason

    def missing(*_: Any) -> None:
        raise RuntimeError("Function is not found")

    driver.cuGreenCtxCreate = missing
    assert make(driver, monkeypatch).reason == "cuGreenCtxCreate: Function is not found"


def test_without_the_bindings_the_reason_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    made = streams.make("partition", None, DEVICE, is_parallel=False)
    assert "hf-pqcache[greenctx]" in made.reason
    assert made.lane.stream == "plain"  # type: ignore[attr-defined]


def test_a_device_too_small_to_be_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "leave nothing for steps" in make(FakeDriver(total=20), monkeypatch).reason


@pytest.mark.parametrize(
    ("compress", "device", "is_parallel", "why"),
    [
        ("inline", DEVICE, False, "not asked for"),
        ("stream", torch.device("cpu"), False, "no streams"),
        ("stream", DEVICE, True, "tensor parallelism"),
    ],
)
def test_when_prompts_are_stored_within_their_step(compress: str, device: torch.device, is_parallel: bool, why: str) -> None:
    made = streams.make(compress, None, device, is_parallel)
    assert isinstance(made.lane, Inline)
    assert why in made.reason


@pytest.mark.parametrize("ratios", [(0.0, None), (1.0, None), (None, -0.5), (0.6, 0.6)])
def test_impossible_shares_are_refused(ratios: tuple[float | None, float | None]) -> None:
    with pytest.raises(ValueError, match="device"):
        Partition(*ratios)
