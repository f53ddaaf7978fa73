"""Result rows and the append-only file that keeps them; knows no model, no task and no way of measuring."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

#: What tells one measurement from another. The unit follows from the metric, the true bits from the settings.
IDENTITY = (
    *("task", "metric", "model", "model_fingerprint", "cache", "settings", "cache_config"),
    *("task_version", "codebook", "seed"),
)


@dataclass(frozen=True)
class Row:
    """One measured figure and all that is needed to understand and repeat it.

    Attributes:
        task: "wikitext-2-raw-v1", "longbench/qasper", "speed", "memory", "recall", "breakdown", ...
        metric: "perplexity", "f1", "ttft", "tpot", "throughput", "peak_bytes", "kv_bytes", "recall", ...
        value: the figure; NaN (null in the file) if it could not be computed.
        unit: "ms", "bytes", "tokens/s", "percent"; "" for a pure number.
        model: Hub id, or the bare name of a local folder. model_fingerprint: which config and weights that was, see
            identity.py; "" in rows that do not know.
        cache: dynamic, static, quanto, kivi, pq, ...; one of `caches.CACHES`.
        settings: what else identifies the measurement: window, stride, mode, tokens, depth, limit, dtype, ...
        cache_config: the cache's own settings, e.g. of PQConfig, or num_bits and group size of a peer.
        task_version: raised whenever a change of the task's code could change its figures.
        true_bits: bits of memory for each key or value number, exact window and tables included; None where not known. Those
            of an old number alone, with its scales, are in the provenance (code_bits).
        codebook: fingerprint of the codebook, None without one.
        seed: of whatever was drawn at random.
        provenance: versions, device, commit, time, notes. Never compared.
    """

    task: str
    metric: str
    value: float
    unit: str = ""
    model: str = ""
    cache: str = "dynamic"
    settings: dict[str, Any] = field(default_factory=dict)
    cache_config: dict[str, Any] = field(default_factory=dict)
    task_version: str = "1"
    true_bits: float | None = None
    codebook: str | None = None
    seed: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    model_fingerprint: str = ""

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of what was measured: two rows with one key are two runs of one measurement."""
        identity = {name: getattr(self, name) for name in IDENTITY}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**asdict(self), "value": None if not math.isfinite(self.value) else self.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Inverse of `to_dict`. Raises ValueError naming what is missing or not known."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown} in a result row; known ones are {sorted(known)}")
        if missing := [name for name in ("task", "metric", "value") if name not in values]:
            raise ValueError(f"a result row lacks {missing}")
        return cls(**{**values, "value": math.nan if values["value"] is None else float(values["value"])})


class Results:
    """Rows in a JSONL file that is only ever appended to, one line a row, on disk before `add` returns.

    Opening it again after an interruption finds every row that was added; a torn last line is dropped. A measurement
    that was run again (`--force`) has several lines: the newest counts. One process writes, others may read.

    Args:
        path: the file, created with its folders at the first `add`. None keeps the rows in memory only.
        is_writer: False for all processes of a run but one: their rows stay in memory.

    Raises:
        ValueError: a line other than the last is not a result row.
    """

    def __init__(self, path: str | Path | None = None, is_writer: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.is_writer = is_writer
        self._rows: dict[str, Row] = {}
        self._valid_bytes = 0
        if self.path is not None and self.path.exists():
            for values, end in read_lines(self.path):
                self._keep(Row.from_dict(values))
                self._valid_bytes = end

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """The newest row of every measurement, in the order in which they were first made."""
        return list(self._rows.values())

    def add(self, row: Row) -> None:
        if self.path is not None and self.is_writer:
            self._valid_bytes = append_line(self.path, row.to_dict(), self._valid_bytes)
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self._rows[row.key] = row


def read_lines(path: Path) -> Iterable[tuple[dict[str, Any], int]]:
    """(object, file offset after its line) of every whole line; a torn last one is skipped. Raises ValueError."""
    data, offset, number = path.read_bytes(), 0, 0
    while (end := data.find(b"\n", offset)) >= 0:
        line, offset, number = data[offset:end], end + 1, number + 1
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); repair or remove it") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(values).__name__}")
        yield values, offset
    if (torn := data[offset:].strip()) and not torn.startswith(b"{"):  # a row that was cut short begins like any other
        raise ValueError(f"{path} ends in something that is no result row, and would lose it; use another file")


def append_line(path: Path, values: dict[str, Any], valid_bytes: int) -> int:
    """Write one line after the first `valid_bytes` of the file (what follows is torn) -> the offset after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "x+b") as file:
        file.seek(valid_bytes)
        file.truncate()
        file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def provenance(device: Any = None, **notes: Any) -> dict[str, Any]:
    """Versions, device, commit and time of a measurement made now; `notes` are added as they are.

    Args:
        device: the torch.device it ran on, if any.
    """
    return {
        **_environment(),
        "device": device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **notes,
    }


@cache
def _environment() -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for package in ("hf-pqcache", "torch", "transformers", "optimum-quanto", "hqq", "lm_eval", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": found, "commit": _commit()}


def _commit() -> str | None:
    """Commit of the checkout that this file lies in, "+" after it if files differ; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: Any) -> str:
    """The GPU's name, or the kind of device and machine."""
    if "torch" in sys.modules and getattr(device, "type", None) == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{getattr(device, 'type', None) or 'cpu'} ({platform.machine()})"
