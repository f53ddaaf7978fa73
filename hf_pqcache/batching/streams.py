"""The streams of an engine: compression on one of its own, and the device's multiprocessors divided among them if asked.

A partition is a *green context* of the CUDA driver, reached through cuda-bindings (the extra `greenctx`; driver 550 or newer).
All partitions come from one split of the device: of two splits the parts would overlap. Where one cannot be had, a plain
stream takes its place, and `Streams.reason` says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_pqcache.batching.lanes import Inline, Lane, StreamLane

COMPRESS = ("inline", "stream", "partition")
#: Multiprocessors for compression where nobody says how many: on an H100 the rest loses nothing that is bound by memory.
COMPRESS_SMS = 16


@dataclass(frozen=True)
class Partition:
    """How the multiprocessors are divided.

    Attributes:
        compress_ratio: share of the device for compression; None is 16 of them. Rounded up to what the device can divide.
        main_ratio: share for steps; None is all that compression leaves.
        main_stream: whether steps keep to their share. If not, they use the whole device, compression's part included.
    """

    compress_ratio: float | None = None
    main_ratio: float | None = None
    main_stream: bool = False

    def __post_init__(self) -> None:
        for name in ("compress_ratio", "main_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio < 1:
                raise ValueError(f"{name}={ratio}: a share of the device's multiprocessors lies between 0 and 1")
        if (self.compress_ratio or 0) + (self.main_ratio or 0) > 1:
            raise ValueError(f"compress_ratio={self.compress_ratio} and main_ratio={self.main_ratio} are more than the device")


@dataclass
class Streams:
    """What an engine computes on.

    Attributes:
        lane: for finished prompts.
        main: the stream for steps; None leaves the engine its own.
        available: whether the device is divided. reason: why not, or why prompts are not stored beside steps.
        sm_counts: multiprocessors by name: device, compress, main.
        keep: what must live as long as the streams.
    """

    lane: Lane
    main: Any = None
    available: bool = False
    reason: str = ""
    sm_counts: dict[str, int] = field(default_factory=dict)
    keep: list[Any] = field(default_factory=list)

    def stats(self) -> dict[str, Any]:
        return {"greenctx_available": self.available, "greenctx_reason": self.reason, "sm_counts": self.sm_counts}


def make(compress: str | Lane, partition: Partition | None, device: torch.device, is_parallel: bool) -> Streams:
    """The streams of an engine on `device`.

    compress: of COMPRESS, or a lane. is_parallel: whether several processes compute the same steps.
    """
    if not isinstance(compress, str):
        return Streams(compress)
    if compress == "inline":
        return Streams(Inline(), reason="not asked for")
    if is_parallel:  # the moment at which a job is done would decide what a step is, differently in each process
        return Streams(Inline(), reason="under tensor parallelism all processes have to take the same steps")
    if device.type != "cuda":
        return Streams(Inline(), reason=f"a device of type {device.type} has no streams")
    if compress == "partition":
        try:
            return divide(device, partition or Partition(), importlib.import_module("cuda.bindings.driver"))
        except ImportError:
            why = "cuda-bindings is not installed; type: pip install 'hf-pqcache[greenctx]'"
        except _DriverError as error:
            why = str(error)
    else:
        why = "not asked for"
    return Streams(StreamLane(torch.cuda.Stream(device)), reason=why)


class _DriverError(Exception):
    """A call of the driver has failed."""


class _Driver:
    """The driver's functions, which raise instead of answering with an error."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, name: str, *arguments: Any) -> Any:
        """What a function gives beside its result code: nothing, one thing or a tuple."""
        function = getattr(self.module, name, None)
        if function is None:
            raise _DriverError(f"cuda-bindings has no {name}; a newer one has")
        try:
            code, *given = function(*arguments)
        except Exception as error:  # cuda-bindings raises where the driver's library lacks a function
            raise _DriverError(f"{name}: {error}") from error
        if int(code) != 0:
            raise _DriverError(f"{name} answered {getattr(code, 'name', code)}")
        return given[0] if len(given) == 1 else tuple(given)


def divide(device: torch.device, partition: Partition, module: Any) -> Streams:
    """A stream for compression, and one for steps if asked, on disjoint parts of a CUDA device; `module` is the driver's.

    Raises _DriverError with the call that has failed.
    """
    driver = _Driver(module)
    torch.cuda.current_stream(device).synchronize()  # green contexts need the device's own context
    handle = driver("cuDeviceGet", device.index or 0)
    whole = driver("cuDeviceGetDevResource", handle, module.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    total, unit = int(whole.sm.smCount), _unit(whole, device)
    wanted = _rounded(COMPRESS_SMS if partition.compress_ratio is None else partition.compress_ratio * total, unit)
    rest = total - wanted
    if rest < unit:
        raise _DriverError(f"{wanted} of {total} multiprocessors for compression leave nothing for steps")
    main = rest if partition.main_ratio is None else min(rest, _rounded(partition.main_ratio * total, unit))
    if main + unit > rest:  # what is left over is main's
        groups, _, left = driver("cuDevSmResourceSplitByCount", 1, whole, 0, wanted)
        parts = {"compress": groups[:1], "main": [left]}
    else:
        groups, _, _ = driver("cuDevSmResourceSplitByCount", total // unit, whole, 0, unit)
        first, last = wanted // unit, (wanted + main) // unit
        parts = {"compress": groups[:first], "main": groups[first:last]}
    made = Streams(Inline(), available=True, sm_counts={"device": total})
    names = ("compress", "main") if partition.main_stream else ("compress",)
    contexts: list[Any] = []
    try:
        streams = [_stream(driver, handle, parts[name], contexts) for name in names]
    except _DriverError:
        for context in contexts:
            module.cuGreenCtxDestroy(context)
        raise
    made.keep = contexts
    made.sm_counts |= {name: sum(int(part.sm.smCount) for part in owned) for name, owned in parts.items()}
    if not partition.main_stream:
        made.sm_counts["main"] = total
    made.lane = StreamLane(torch.cuda.ExternalStream(streams[0], device=device), "partition")
    if partition.main_stream:
        made.main = torch.cuda.ExternalStream(streams[1], device=device)
    return made


def _stream(driver: _Driver, device: Any, parts: Sequence[Any], contexts: list[Any]) -> int:
    """The address of a stream on some parts of a device, whose context goes to `contexts`."""
    module = driver.module
    described = driver("cuDevResourceGenerateDesc", list(parts), len(parts))
    contexts.append(driver("cuGreenCtxCreate", described, device, module.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM))
    return int(driver("cuGreenCtxStreamCreate", contexts[-1], module.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))


def _unit(whole: Any, device: torch.device) -> int:
    """Of how many multiprocessors parts are made: 8 from Hopper on, 2 before, where the driver does not say."""
    told = int(getattr(whole.sm, "smCoscheduledAlignment", 0) or 0)
    return told or (8 if torch.cuda.get_device_capability(device)[0] >= 9 else 2)


def _rounded(count: float, unit: int) -> int:
    return max(unit, -(-int(count) // unit) * unit)
