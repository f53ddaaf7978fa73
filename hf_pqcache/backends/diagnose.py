"""What works on this machine and how to mend what does not: versions, GPU, CuPy, kernels, memory; runs no model."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from hf_pqcache.backends import dispatch, nvrtc
from hf_pqcache.models import tested

Status = Literal["ok", "note", "fail"]
#: Where no GPU is: architectures to compile for, with the shared memory that a block may have (A100, H100).
ARCHITECTURES = {(8, 0): 166_912, (9, 0): 232_448}
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "huggingface_hub", "datasets")
_CUPY = {"cupy-cuda12x": 12, "cupy-cuda13x": 13, "cupy": 0}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "ok"; "note", something is absent that this machine need not have; "fail", something is broken.
        fix: a line to copy, empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def diagnose(show: Callable[[Finding], object] | None = None, *, kernels: bool = True) -> list[Finding]:
    """Look at everything. `show` is given each finding as it is made; `kernels=False` leaves out compiling them."""
    steps = [_versions, _imports, _gpu, _cupy, _nvrtc, *([_kernels] if kernels else []), _engine, _memory]
    findings: list[Finding] = []
    for step in steps:
        for finding in step():
            findings.append(finding)
            if show is not None:
                show(finding)
    return findings


def _requirements() -> dict[str, Requirement]:
    try:
        lines = importlib.metadata.requires("hf-pqcache") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return {}
    parsed = [Requirement(line) for line in lines]
    return {r.name.replace("-", "_"): r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def _versions() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    required = _requirements()
    for name in _PACKAGES:
        asked = required.get(name)
        fix = f'pip install "{asked or name}"'
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed", fix)
            continue
        if asked is not None and not asked.specifier.contains(Version(version).base_version, prereleases=True):
            yield Finding(name, "fail", f"{version}, needed is {asked.specifier}", fix)
        elif name not in tested.RANGES:
            yield Finding(name, "ok", version)
        elif tested.is_newer(name, version):
            detail = f"{version}, newer than what was tested: {tested.range_text(name)}"
            yield Finding(name, "note", detail, f"{tested.newest_tested(name)}  # if something goes wrong")
        else:
            yield Finding(name, "ok", f"{version} (tested: {tested.range_text(name)})")


def _imports() -> Iterator[Finding]:
    """Whether the installed transformers has all that the caches use of it."""
    try:
        importlib.import_module("hf_pqcache.cache.caches")
    except ImportError as error:
        yield Finding("the caches", "fail", str(tested.explain(error)), tested.newest_tested("transformers"))


def driver_version() -> tuple[int, int] | None:
    """Newest CUDA version that the installed driver serves, or None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _gpu() -> Iterator[Finding]:
    driver = driver_version()
    if driver is None:
        yield Finding("driver", "note", "no NVIDIA driver: the plain-torch engine serves, slowly")
    else:
        yield Finding("driver", "ok", f"serves CUDA {driver[0]}.{driver[1]}")
    if torch.version.cuda is None:
        fix = "pip install --force-reinstall torch" if driver else ""
        yield Finding("torch's CUDA", "fail" if driver else "note", "this torch is built for the CPU only", fix)
        return
    if not torch.cuda.is_available():
        detail = f"torch is built for CUDA {torch.version.cuda} and sees no GPU"
        yield Finding("GPU", "fail" if driver else "note", detail, "nvidia-smi  # does the driver see it?" if driver else "")
        return
    for i in range(torch.cuda.device_count()):
        p: Any = torch.cuda.get_device_properties(i)
        detail = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        if (p.major, p.minor) < dispatch.MIN_CAPABILITY:
            yield Finding(f"GPU {i}", "note", f"{detail}: too old for the kernels, plain torch serves")
        else:
            yield Finding(f"GPU {i}", "ok", detail)


def _extra() -> str:
    """The extra of this package that fits the driver."""
    driver = driver_version()
    return "cuda13" if driver is not None and driver[0] >= 13 else "cuda12"


def _cupy() -> Iterator[Finding]:
    has_gpu = torch.cuda.is_available()
    found = {}
    for name in _CUPY:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    install = f'pip install "hf-pqcache[{_extra()}]"'
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    driver = driver_version()
    if not found:
        yield Finding("CuPy", "fail" if has_gpu else "note", "not installed", install if has_gpu else "")
    elif len(found) > 1:
        yield Finding(
            "CuPy", "fail", f"{listed}: only one may be installed", f"pip uninstall -y {' '.join(found)} && {install}"
        )
    elif driver is not None and _CUPY[next(iter(found))] > driver[0]:
        detail = f"{listed} is newer than the driver's CUDA {driver[0]}.{driver[1]}"
        yield Finding("CuPy", "fail", detail, f"pip uninstall -y {next(iter(found))} && {install}")
    else:
        yield Finding("CuPy", "ok", listed)


def _nvrtc() -> Iterator[Finding]:
    found = nvrtc.find()
    if found is not None:
        yield Finding("NVRTC", "ok", f"{nvrtc.version()} ({found[1]})")
    else:
        status: Status = "fail" if torch.cuda.is_available() else "note"
        yield Finding("NVRTC", status, "no library to compile kernels with", "pip install nvidia-cuda-nvrtc-cu12")


def _kernels() -> Iterator[Finding]:
    if nvrtc.find() is None:
        return
    if torch.cuda.is_available():
        p: Any = torch.cuda.get_device_properties(0)
        targets = {(p.major, p.minor): p.shared_memory_per_block_optin}
    else:
        targets = ARCHITECTURES
    for head_dim, codes in dispatch.SHAPES:
        errors = kernel_errors(head_dim, codes, targets)
        kind = dispatch.kind_of(codes)
        name = f"kernels d={head_dim}" + ("" if codes[0] is None else f" {dispatch.codes_text(codes)}")
        where = ", ".join(f"sm_{major}{minor}" for major, minor in targets)
        if errors:
            yield Finding(name, "fail", errors[0], "pip install --upgrade --force-reinstall hf-pqcache nvidia-cuda-nvrtc-cu12")
        else:
            yield Finding(name, "ok", f"{kind}, compile for {where}")


def kernel_errors(head_dim: int, codes: dispatch.Codes, targets: Mapping[tuple[int, int], int]) -> list[str]:
    """Compile what a layer uses, with NVRTC -> what failed, and the compiler's first words.

    targets: compute capability -> bytes of shared memory that a block may have.
    """
    return [
        f"{spec.source} for sm_{capability[0]}{capability[1]}: {error.strip().splitlines()[0]}"
        for capability, shared_bytes in targets.items()
        for spec in dispatch.specs(head_dim, codes, capability, shared_bytes)
        if (error := nvrtc.compile_error(spec, capability))
    ]


def _engine() -> Iterator[Finding]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    choice = dispatch.select((128, 128), dispatch.point(4, 128), 4, torch.float16, device)
    yield Finding("engine", "ok", f"{choice.name} (head_dim 128, 4 bits): {choice.reason}")


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("host memory", "ok", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        low = free < 2**30
        fix = "nvidia-smi  # who holds it? lower max_pages of the cache if it must stay" if low else ""
        detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Finding(f"memory of GPU {i}", "note" if low else "ok", detail, fix)
