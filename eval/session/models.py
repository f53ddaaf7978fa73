"""Loads a language model, or one that takes images beside text, and its tokenizer; knows no cache and no task."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.distributed import DistributedConfig

from hf_pqcache.codebook import hub

DTYPES = ("auto", "float32", "float16", "bfloat16")
#: What `quantization` may be: (transformers' config class, its arguments).
QUANTIZATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bnb-4bit": ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb-8bit": ("BitsAndBytesConfig", {"load_in_8bit": True}),
    "hqq-4bit": ("HqqConfig", {"nbits": 4, "group_size": 64}),
    "hqq-8bit": ("HqqConfig", {"nbits": 8, "group_size": 64}),
    "quanto-int4": ("QuantoConfig", {"weights": "int4"}),
    "quanto-int8": ("QuantoConfig", {"weights": "int8"}),
    "torchao-int8": ("TorchAoConfig", {"quant_type": "int8_weight_only"}),
}


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    is_parallel: bool = False,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). A local folder is read without asking the Hub anything.

    Args:
        name: folder or Hub id; also of weights that are quantized already. Or a .gguf file, whose weights are decoded.
        revision: of the Hub repository.
        dtype: "auto" (as saved), "float32", "float16" or "bfloat16".
        device: "cpu", "cuda", "cuda:1", ...; None means CUDA if there is one. "auto" spreads it over all devices.
        device_map: how transformers spreads it over devices; in place of `device`.
        attn_implementation: passed on; None leaves the choice to transformers.
        quantization: one of QUANTIZATIONS, weights become that as they are loaded.
        trust_remote_code: whether code of the repository may run.
        model_kwargs: more arguments of `from_pretrained`.
        is_parallel: whether the processes of RANK and WORLD_SIZE share the model, each some of its heads, on the GPU of its
            LOCAL_RANK; in place of `device`.

    Raises:
        ValueError: an unknown dtype, device or quantization, or damaged weights. ImportError: a library for quantized
        weights is missing. OSError: no such model, or no network to fetch it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {DTYPES}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r} is unknown; use one of {sorted(QUANTIZATIONS)}")
    device = "auto" if is_parallel else check_device(device)  # which would begin on the first GPU in all processes
    source, where = _where(str(name), revision, trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), **(model_kwargs or {})}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if "gguf_file" in where and hasattr(transformers, "GgufConfig"):  # without it they stay packed, and slow
        if quantization is not None:
            raise ValueError(f"quantization={quantization!r} and {name}: a .gguf file has its own; leave one of them out")
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if quantization is not None:
        kind, settings = QUANTIZATIONS[quantization]
        options["quantization_config"] = getattr(transformers, kind)(**settings)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    try:
        if is_parallel:
            options["distributed_config"] = DistributedConfig(tp_plan="auto")
        elif device_map is not None or device == "auto":
            options["device_map"] = device_map or "auto"
        elif "gguf_file" not in where and ("quantization_config" in options or _is_quantized(source, where)):
            options.setdefault("device_map", {"": device})  # quantized weights do not move once they are loaded
        model: Any = _kind(source, where).from_pretrained(source, **where, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _told(name, error) from error
    if "device_map" not in options and not is_parallel:
        model.to(device)
    return model.eval(), tokenizer


def load_config(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The model's transformers config, without its weights, as `load_model` would leave it. Raises what that raises."""
    try:
        source, where = _where(str(name), revision, trust_remote_code)
        return AutoConfig.from_pretrained(source, **where, **(model_kwargs or {}))
    except ImportError:
        raise
    except Exception as error:
        raise _told(name, error) from error


def load_tokenizer(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises what `load_model` raises."""
    try:
        source, where = _where(str(name), revision, trust_remote_code)
        return AutoTokenizer.from_pretrained(source, **where)
    except ImportError:
        raise
    except Exception as error:
        raise _told(name, error) from error


def _is_quantized(source: str, where: dict[str, Any]) -> bool:
    return getattr(AutoConfig.from_pretrained(source, **where), "quantization_config", None) is not None


def _kind(source: str, where: dict[str, Any]) -> Any:
    """The class that loads a model: a language model's, or that of one which takes images beside text."""
    config = type(AutoConfig.from_pretrained(source, **where))
    with_images = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_only_there = config in with_images and config not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if is_only_there else AutoModelForCausalLM


def _where(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes: the folder or Hub id, and arguments that say where in it, and what may run.

    Raises OSError at once if it is not to be had, ImportError for a .gguf file where nothing reads it.
    """
    remote = {"trust_remote_code": True} if trust_remote_code else {}
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        if find_spec("gguf") is None:
            raise ImportError(f"{path.name} needs the package gguf; type: pip install 'hf-pqcache[gguf]'")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.exists():
        return name, {"local_files_only": True, **remote}
    if hub.is_reachable():
        return name, {"revision": revision, **remote}
    if not hub.has_local(name, "config.json", revision):
        raise OSError(f"cannot get {name}: the Hub cannot be reached; give --model a folder to do without")
    return name, {"revision": revision, "local_files_only": True, **remote}


def check_device(device: str | None) -> str:
    """The device as it will be used; None is the GPU if there is one. Raises ValueError if it is not on this machine."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    try:
        kind = torch.device(device)
        if kind.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"device={device!r}: torch sees no CUDA device here; use cpu (`pqcache doctor` says more)")
            if (kind.index or 0) >= torch.cuda.device_count():
                raise ValueError(
                    f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0"
                )
        torch.empty(0, device=kind)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"device={device!r} is not on this machine; use cpu, cuda, cuda:1, mps or auto") from error
    return device


def _told(name: str | Path, error: Exception) -> Exception:
    """What a failure to load means, in one line."""
    text = " ".join(str(error).split())
    if Path(name).exists():
        is_cut = "safetensor" in type(error).__name__.lower() or "safetensor" in text.lower() or isinstance(error, EOFError)
        hint = "; its weights may be cut short: copy or download it again" if is_cut else ""
        return ValueError(f"cannot load the model in {name}: {text or type(error).__name__}{hint}")
    if isinstance(error, OSError):
        return OSError(f"cannot get {name} from the Hub, give --model a folder to do without: {text}")
    return ValueError(f"cannot load {name}: {text or type(error).__name__}")


def public_name(name: str | Path) -> str:
    """What result rows call a model: its Hub id, or the bare name of its folder or file (a path is nobody's business)."""
    if Path(name).is_file():
        return Path(name).stem
    return Path(name).resolve().name if Path(name).is_dir() else str(name)


def token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """text -> token ids int64 (N), without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
