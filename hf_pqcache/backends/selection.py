"""Which engine serves a shape on a device, and why; knows sizes and devices, no tensor and no launch."""

from __future__ import annotations

import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from hf_pqcache.backends import jit, launch
from hf_pqcache.backends.launch import Device, Geometry
from hf_pqcache.errors import NoKernelError

EngineName = Literal["tuned", "generic", "paged", "torch"]
MAX_GROUP, MAX_HEAD_DIM, MIN_CAPABILITY = 16, 256, (8, 0)
FORCED = "forced by HF_PQCACHE_KERNEL"


class Choice(NamedTuple):
    """Which engine serves a shape, and why."""

    name: EngineName
    reason: str


def _why_not_tuned(shape: tuple[int, int, int], available: int) -> str | None:
    source = jit.tuned_shapes().get(shape)
    if source is None:
        return "no tuned kernel for head_dim={}, M={}, num_bits={}".format(*shape)
    needed = launch.tuned_shared_bytes(*jit.table_shape(source), key_copies=1)
    if needed > available:
        return f"the tuned kernel needs {needed} bytes of shared memory and the device gives a block {available}"
    return None


def _why_no_cuda(head_dim: int, value_dim: int, group: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the cache is on {device.type}"
    if (missing := jit.why_unavailable()) is not None:
        return missing
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if (capability := launch.device_of(device.index or 0).capability) < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 or bfloat16, the model is {dtype}"
    if not 1 <= group <= MAX_GROUP:
        return f"{group} query heads for each KV head are more than {MAX_GROUP}"
    if head_dim > MAX_HEAD_DIM or head_dim % 4:
        return f"head_dim={head_dim} is above {MAX_HEAD_DIM} or no multiple of 4"
    if value_dim != head_dim:
        return f"value_dim={value_dim} differs from head_dim={head_dim}"
    return None


@cache
def _select(
    shape: tuple[int, int, int], value_dim: int, group: int, dtype: torch.dtype, device: torch.device, forced: str
) -> Choice:
    if forced not in ("", "tuned", "generic", "torch"):
        raise ValueError(f"HF_PQCACHE_KERNEL={forced!r} is none of tuned, generic, torch")
    if forced == "torch":
        return Choice("torch", FORCED)
    why = _why_no_cuda(shape[0], value_dim, group, dtype, device)
    if why is not None:
        if forced:
            raise NoKernelError(f"HF_PQCACHE_KERNEL={forced}, but {why}; unset it to use plain torch")
        return Choice("torch", why)
    why = _why_not_tuned(shape, launch.device_of(device.index or 0).shared_bytes)
    if forced == "generic":
        return Choice("generic", FORCED)
    if why is None:
        return Choice("tuned", FORCED if forced else f"kernels/{jit.tuned_shapes()[shape]}")
    if forced == "tuned":
        raise NoKernelError(f"HF_PQCACHE_KERNEL=tuned, but {why}; unset it to use the generic kernel")
    return Choice("generic", why)


def select(
    head_dim: int,
    value_dim: int,
    num_subspaces: int,
    num_bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Choice:
    """The engine for a layer: tuned, else generic, else torch. HF_PQCACHE_KERNEL forces one.

    Raises NoKernelError (PQC002) if the forced one does not serve this shape.
    """
    forced = os.environ.get("HF_PQCACHE_KERNEL", "")
    return _select((head_dim, num_subspaces, num_bits), value_dim, group, dtype, device, forced)


def select_paged(head_dim: int, value_dim: int, group: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The engine for a layer of exact pages: paged, else torch. HF_PQCACHE_KERNEL=torch forces the latter."""
    if os.environ.get("HF_PQCACHE_KERNEL", "") == "torch":
        return Choice("torch", FORCED)
    why = _why_no_cuda(head_dim, value_dim, group, dtype, device)
    if why is None and head_dim % 8:
        why = f"head_dim={head_dim} is no multiple of 8"
    return Choice("paged", "kernels/attend_paged.cu") if why is None else Choice("torch", why)


def specs(shape: tuple[int, int, int], capability: tuple[int, int], shared_bytes: int) -> list[jit.KernelSpec]:
    """The kernels that a layer of (head_dim, M, num_bits) uses on such a device: to attend, to append, to encode.

    (head_dim, 0, 0) is a layer of exact pages, which torch fills at prefill.
    """
    device = Device(capability, 132, shared_bytes)
    name = "paged" if not shape[1] else "tuned" if _why_not_tuned(shape, shared_bytes) is None else "generic"
    geometry = Geometry(*shape, kv_heads=8, batch=1, page_size=64, sink_tokens=4, window_slots=192, table_width=1000)
    attending = launch.attend_plan(geometry, 4, name, False, 0, False, 4096, device).spec
    encoding = [launch.encode_plan(shape, False, "encode.cu").spec] if shape[1] else []
    return [attending, launch.append_spec(shape, False), *encoding]
