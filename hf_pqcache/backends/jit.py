"""Finds a kernel's source, compiles it (NVRTC) at first use and launches it; the only file that imports CuPy."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: file `source` in kernels/, its extern "C" `entry`, and what is defined for it.

    overlaps: it may start while the kernel before it ends, because it waits for that one itself.
    """

    source: str
    entry: str
    threads: int
    shared_bytes: int
    defines: tuple[tuple[str, int], ...]
    overlaps: bool = False

    @property
    def options(self) -> list[str]:
        defines = [*self.defines, ("PQ_SHARED_BYTES", self.shared_bytes)]
        return [f"-D{name}={value}" for name, value in defines]


@cache
def sources_digest() -> str:
    """Hash of every source. CuPy's disk cache keys on the main source and the options only, not on what it includes."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.cu*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def why_unavailable() -> str | None:
    """Why kernels cannot be compiled here, or None if they can. Does not import CuPy."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install hf-pqcache[cuda13] or [cuda12])"
    if not SOURCES.is_dir():
        return f"no kernel sources in {SOURCES}"
    return None


# CUlaunchConfig and one CUlaunchAttribute of cuda.h: grid, block, shared bytes, stream, attributes, their number.
_CONFIG = Struct("<7I4xQQI4x")
_OVERLAP_ATTRIBUTE = Struct("<I4xI60x").pack(6, 1)  # PROGRAMMATIC_STREAM_SERIALIZATION
_MIN_OVERLAP_DRIVER = 12040  # from 12.4 on, captured graphs keep the attribute


class _Buffers(threading.local):
    """A launch's arguments, one block of memory for each thread; the driver has read them when the launch returns."""

    def __init__(self, size: int) -> None:
        self.arguments = ctypes.create_string_buffer(size)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.arguments))
        self.address = ctypes.addressof(self.pointers)
        self.attribute = ctypes.create_string_buffer(_OVERLAP_ATTRIBUTE, len(_OVERLAP_ATTRIBUTE))
        self.attribute_address = ctypes.addressof(self.attribute)
        self.config = ctypes.create_string_buffer(_CONFIG.size)
        self.config_address = ctypes.addressof(self.config)


@cache
def _driver() -> Any:
    """The CUDA driver: CuPy offers no launch with attributes."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


@cache
def _can_overlap(device: int) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch)."""
    import cupy

    return (
        int(cupy.cuda.Device(device).compute_capability) >= 90 and cupy.cuda.runtime.driverGetVersion() >= _MIN_OVERLAP_DRIVER
    )


class Kernel:
    """A compiled kernel on one device. It takes one struct, given as the values of `layout`."""

    def __init__(self, spec: KernelSpec, device: int, layout: Struct) -> None:
        import cupy

        begin = time.perf_counter()
        code = (SOURCES / spec.source).read_text()
        options = ("-std=c++17", f"-I{SOURCES}", f"-DPQ_DIGEST=0x{sources_digest()}ull", *spec.options)
        with cupy.cuda.Device(device):
            self._raw = cupy.RawKernel(code, spec.entry, options=options)
            if spec.shared_bytes > 48 * 1024:
                self._raw.max_dynamic_shared_size_bytes = spec.shared_bytes
            self._function = self._raw.kernel.ptr
        self.registers, self.local_bytes = self._raw.num_regs, self._raw.local_size_bytes
        self.spec = spec
        self._device = device
        self._layout = layout
        self._buffers = _Buffers(layout.size)
        self._launch = _driver().cuLaunchKernelEx
        self._num_attributes = int(spec.overlaps and _can_overlap(device))
        logger.info(
            "compiled %s (%s) in %.1f s: %d registers, %d bytes of local memory",
            spec.source,
            " ".join(spec.options),
            time.perf_counter() - begin,
            self.registers,
            self.local_bytes,
        )

    def launch(self, grid: tuple[int, int, int], stream: int, *values: Any) -> None:
        """Launch a grid of blocks on the raw `stream` with the struct made of `values`; nothing is checked."""
        buffers, spec, number = self._buffers, self.spec, self._num_attributes
        self._layout.pack_into(buffers.arguments, 0, *values)
        _CONFIG.pack_into(
            buffers.config, 0, *grid, spec.threads, 1, 1, spec.shared_bytes, stream, buffers.attribute_address, number
        )
        # A model spread over several GPUs leaves the first one current, and a launch goes to the current one only.
        if torch._C._cuda_getDevice() == self._device:
            status = self._launch(buffers.config_address, self._function, buffers.address, None)
        else:
            with torch.cuda.device(self._device):
                status = self._launch(buffers.config_address, self._function, buffers.address, None)
        if status:
            raise RuntimeError(f"launching {spec.source} failed with CUDA driver error {status}")


@cache
def load(spec: KernelSpec, device: int, layout: Struct) -> Kernel:
    """The kernel of `spec` on `device`, compiled if this process has not got it yet (CuPy keeps it on disk, too)."""
    return Kernel(spec, device, layout)
