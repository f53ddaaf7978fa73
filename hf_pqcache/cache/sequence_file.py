"""What is stored as bytes: tensors in safetensors, and in the header what they are; knows no cache and no model.

Nothing is ever unpickled, and nothing is allocated for what the bytes only announce: the safetensors reader compares a
header with the length of the file before it makes a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_NAME = "sequence"  # of the description in the header
#: Most bytes of a header: five tensors for each of a thousand layers, and a config.
_MAX_HEADER_BYTES = 1 << 22


@dataclass(frozen=True)
class Kind:
    """What bytes hold.

    Attributes:
        format, version: of the description. maker: the method that returns such bytes. noun: what people call them.
    """

    format: str
    version: int
    maker: str
    noun: str

    @property
    def say(self) -> str:
        return f"is damaged or cut short, or no {self.noun}"


SEQUENCE = Kind("hf-pqcache-sequence", 1, "export_sequence", "exported sequence")


def pack(description: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: Kind = SEQUENCE) -> bytes:
    """The bytes of `tensors`, on any device, and of a description in JSON values."""
    on_host = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}  # safetensors takes no views
    facts = {"format": kind.format, "schema_version": kind.version, **description}
    text = json.dumps({**facts, "digest": _digest(facts, on_host)}, allow_nan=False)
    return bytes(save(on_host, metadata={_NAME: text}))


def unpack(data: bytes, kind: Kind = SEQUENCE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `pack`. Raises TypeError for anything but bytes, ValueError for bytes of another kind."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data must be what {kind.maker} returned, bytes, got {type(data).__name__}: read a file's with "
                        "Path(...).read_bytes()")  # fmt: skip
    data = bytes(data)
    description = _description(data, kind)
    try:
        tensors = load(data)
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise ValueError(f"data {kind.say}: {error}; export or copy it again") from None
    noted = description.pop("digest", None)
    if noted != _digest(description, tensors):
        raise ValueError("data are not as they were exported: the digest differs; export or copy them again")
    return description, tensors


def _description(data: bytes, kind: Kind) -> dict[str, Any]:
    """What the header says. Raises ValueError."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"data of {len(data)} bytes {kind.say}; export or copy it again")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"data has a header of {size} bytes; no {kind.noun} needs over {_MAX_HEADER_BYTES}")
    try:
        header = json.loads(data[8 : 8 + size])
        found = json.loads(header["__metadata__"][_NAME])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"data {kind.say}: its header has no description; pass what {kind.maker} returned") from None
    if not isinstance(found, dict) or found.get("format") != kind.format:
        raise ValueError(f"data {kind.say}: expected the format {kind.format!r}; pass what {kind.maker} returned")
    if found.get("schema_version") != kind.version:
        raise ValueError(
            f"data has schema_version={short(found.get('schema_version'))} and this version of hf_pqcache reads "
            f"{kind.version}: use the version that exported it, or export it again"
        )
    return found


def _digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the description and every tensor: any bit that changes on the way is seen."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f" {name} {x.dtype} {tuple(x.shape)} ".encode())
        if x.numel():
            digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
