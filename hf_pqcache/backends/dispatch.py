"""Which backend serves a layer, and why: CUDA kernels where they can, plain torch elsewhere; launches nothing."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, jit, launch
from hf_pqcache.backends.launch import Device, Geometry
from hf_pqcache.config import OPERATING_POINTS, CodeShape, PQConfig
from hf_pqcache.errors import NoKernelError
from hf_pqcache.pages.device_state import DeviceState
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.pages.layout import num_units

logger = logging.getLogger(__name__)

BackendName = Literal["tuned", "generic", "exact", "torch"]
#: Codes of keys and of values; None where pages hold exact tokens.
Codes = tuple[CodeShape | None, CodeShape | None]
MAX_GROUP, MAX_HEAD_DIM, MAX_WIDTH, MIN_CAPABILITY = 16, 256, 32, (8, 0)
FORCED = "forced by HF_PQCACHE_KERNEL"


def point(bits: int, head_dim: int) -> Codes:
    """The codes of an operating point."""
    config = PQConfig(bits=bits)
    return config.codes("key", head_dim), config.codes("value", head_dim)


#: What `pqcache doctor` compiles: the operating points at common head_dims, one whose codes have no order of their own, and
#: exact pages.
SHAPES: list[tuple[int, Codes]] = [(d, point(bits, d)) for d in (64, 128) for bits in sorted(OPERATING_POINTS, reverse=True)]
SHAPES += [(80, (CodeShape(40, 5), CodeShape(20, 7))), (128, (None, None))]


def kind_of(codes: Codes) -> BackendName:
    """The kernel that serves such codes."""
    return "exact" if codes[0] is None else "tuned" if _why_not_tuned(codes) is None else "generic"


def codes_text(codes: Codes) -> str:
    """As tables name them: "M=64 n=8", or "M=64/32 n=8" where keys and values differ."""
    shapes = [shape for shape in codes if shape is not None]
    parts = (dict.fromkeys(shape.num_subspaces for shape in shapes), dict.fromkeys(shape.num_bits for shape in shapes))
    return "M={} n={}".format(*("/".join(map(str, part)) for part in parts))


class Choice(NamedTuple):
    """Which backend serves a shape, and why. "tuned" and "generic" are one kernel, whose lanes read codes as they lie, or one
    by one."""

    name: BackendName
    reason: str


def _why_not_tuned(codes: Codes) -> str | None:
    for which, shape in zip(("keys", "values"), codes, strict=True):
        if shape is not None and num_units(*shape) is None:
            return f"{which} of M={shape.num_subspaces}, num_bits={shape.num_bits} have no order of their own within a tile"
    return None


def why_no_cuda(dims: tuple[int, int], codes: Codes, group: int, dtype: torch.dtype, device: torch.device) -> str | None:
    head_dim, value_dim = dims
    if device.type != "cuda":
        return f"the cache is on {device.type}"
    if (missing := jit.why_unavailable()) is not None:
        return missing
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    found = launch.device_of(device.index or 0)
    if found.capability < MIN_CAPABILITY:
        return f"compute capability {found.capability} is below {MIN_CAPABILITY}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 or bfloat16, the model is {dtype}"
    if not 1 <= group <= MAX_GROUP:
        return f"{group} query heads for each KV head are more than {MAX_GROUP}"
    multiple = 8 if codes[0] is None else 4
    if head_dim > MAX_HEAD_DIM or head_dim % multiple:
        return f"head_dim={head_dim} is above {MAX_HEAD_DIM} or no multiple of {multiple}"
    if value_dim != head_dim:
        return f"value_dim={value_dim} differs from head_dim={head_dim}"
    for shape in codes:
        if shape is not None and head_dim // shape.num_subspaces > MAX_WIDTH:
            return f"parts of {head_dim // shape.num_subspaces} numbers are longer than {MAX_WIDTH}"
    if codes[0] is not None and (needed := _shared_bytes(head_dim, codes)) > found.shared_bytes:
        return f"the kernel needs {needed} bytes of shared memory and the device gives a block {found.shared_bytes}"
    return None


def _shared_bytes(head_dim: int, codes: Codes) -> int:
    return max(spec.shared_bytes for spec in _specs(head_dim, codes, Device(MIN_CAPABILITY, 132, 0)))


@cache
def _select(dims: tuple[int, int], codes: Codes, group: int, dtype: torch.dtype, device: torch.device, forced: str) -> Choice:
    if forced not in ("", "tuned", "generic", "torch"):
        raise ValueError(f"HF_PQCACHE_KERNEL={forced!r} is none of tuned, generic, torch")
    if forced == "torch":
        return Choice("torch", FORCED)
    why = why_no_cuda(dims, codes, group, dtype, device)
    if why is not None:
        if forced and codes[0] is not None:
            raise NoKernelError(f"HF_PQCACHE_KERNEL={forced}, but {why}; unset it to use plain torch")
        return Choice("torch", why)
    if codes[0] is None:
        return Choice("exact", "kernels/attend_paged.cu")
    why = _why_not_tuned(codes)
    if why is not None and forced == "tuned":
        raise NoKernelError(f"HF_PQCACHE_KERNEL=tuned, but {why}; unset it to use the generic kernel")
    return Choice("generic", why) if why is not None else Choice("tuned", FORCED if forced else "kernels/attend_codes.cu")


def select(dims: tuple[int, int], codes: Codes, group: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The backend for a layer whose keys and values have `dims` numbers: kernels, else torch.

    HF_PQCACHE_KERNEL forces one for pages of codes; torch, for exact pages as well. Raises NoKernelError (PQC002) if the forced
    one does not serve this shape.
    """
    return _select(dims, codes, group, dtype, device, os.environ.get("HF_PQCACHE_KERNEL", ""))


def specs(head_dim: int, codes: Codes, capability: tuple[int, int], shared_bytes: int) -> list[jit.KernelSpec]:
    """The kernels that a layer uses on such a device: to attend, to append, to encode keys, to encode values.

    Exact pages are filled by torch at prefill.
    """
    return _specs(head_dim, codes, Device(capability, 132, shared_bytes))


def _specs(head_dim: int, codes: Codes, device: Device) -> list[jit.KernelSpec]:
    keys, values = codes
    sizes = {"kv_heads": 8, "batch": 1, "page_size": 64, "page_stride": 1 << 16, "sink_tokens": 4, "window_slots": 192}
    geometry = Geometry(head_dim, keys, values, **sizes, table_width=1000)
    found = [
        launch.attend_plan(geometry, 4, False, 0, False, 4096, device).spec,
        launch.append_spec(head_dim, keys, values, False),
    ]
    if keys is not None and values is not None:
        found += [launch.encode_spec(head_dim, keys, False, False), launch.encode_spec(head_dim, values, True, False)]
    return found


# -- of a layer ------------------------------------------------------------------------------------------------------
def _select_for(view: LayerView, group: int) -> Choice:
    """The backend for a layer with `group` query heads per KV head."""
    dims, codes = (view.window_keys.shape[3], view.window_values.shape[3]), (view.key_codec.codes, view.value_codec.codes)
    return select(dims, codes, group, view.window_keys.dtype, view.device)


def serves(view: LayerView, group: int) -> bool:
    """Whether attention of `group` query heads per KV head over a layer runs on kernels, which CUDA graphs can hold."""
    return _select_for(view, group).name != "torch"


def publish(state: DeviceState, layer: int, view: LayerView) -> None:
    """Register the storage of a layer with its device, after preparing what kernels need of it.

    To be called again whenever one of the view's tensors is replaced.
    """
    view.kernels = None if _select_for(view, 1).name == "torch" else cuda_backend.prepare_layer(view)
    state.add_view(layer, view)


def choose(state: DeviceState, layer: int, query: Tensor) -> Choice:
    """The backend for attention of `query` (B, Hq, 1, d) over a layer; chosen once, said once in the log."""
    view = state.views[layer]
    group = query.shape[1] // view.window_keys.shape[1]
    choice: Choice | None = state.choices.get((layer, group))
    if choice is not None:
        return choice
    choice = _select_for(view, group)
    if choice not in state.choices.values():
        is_unexpected = choice.name == "torch" and query.is_cuda and choice.reason != FORCED
        level = logging.WARNING if is_unexpected else logging.INFO
        logger.log(level, "attention over pages runs on the %s backend: %s", choice.name, choice.reason)
    state.choices[layer, group] = choice
    return choice
