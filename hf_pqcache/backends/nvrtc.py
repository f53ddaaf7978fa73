"""NVRTC through ctypes: compiles a kernel for an architecture without a device and without CuPy; launches nothing."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from hf_pqcache.backends.jit import SOURCES, KernelSpec

#: Python packages that carry the library, newest first, and its names where the CUDA toolkit is installed.
_WHEELS = ("nvidia.cu13", "nvidia.cuda_nvrtc")
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@cache
def find() -> tuple[Any, str] | None:
    """(the library, where it lies), or None where there is none."""
    for wheel in _WHEELS:
        try:
            spec = importlib.util.find_spec(wheel)
        except ModuleNotFoundError:
            continue
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(root).glob("lib/libnvrtc.so.*")):
                return ctypes.CDLL(str(path)), str(path)
    for name in _NAMES:
        try:
            return ctypes.CDLL(name), name
        except OSError:
            continue
    return None


def version() -> str | None:
    """Version of the library found, such as "12.8"."""
    if (found := find()) is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    found[0].nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_log(spec: KernelSpec, capability: tuple[int, int]) -> tuple[bool, str]:
    """Compile `spec` for a compute capability -> (whether it compiles, what the compilers say).

    They say what is wrong, or else the registers that the kernel takes and the bytes that it spills.

    Raises FileNotFoundError where no NVRTC is installed.
    """
    if (found := find()) is None:
        raise FileNotFoundError("no NVRTC library: pip install nvidia-cuda-nvrtc-cu12, or install the CUDA toolkit")
    library, program = found[0], ctypes.c_void_p()
    code = (SOURCES / spec.source).read_bytes()
    library.nvrtcCreateProgram(ctypes.byref(program), code, spec.source.encode(), 0, None, None)
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    options = [arch, "-std=c++17", "--ptxas-options=-v", f"-I{SOURCES}", *spec.options]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = library.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status == 0, log.value.decode(errors="replace") or f"NVRTC status {status}"


def compile_error(spec: KernelSpec, capability: tuple[int, int]) -> str | None:
    """The compilers' words where `spec` does not compile for a compute capability, else None; raises as `compile_log`."""
    compiles, log = compile_log(spec, capability)
    return None if compiles else log
