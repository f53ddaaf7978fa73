"""TextTask: the perplexity of one text, read from plain files as published or from the Hub. Knows no particular text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_pqcache.cache.footprint import plan_memory
from hf_pqcache.eval.measure import shares
from hf_pqcache.eval.measure.deployed import CHUNK, PREFILL, cache_perplexity
from hf_pqcache.eval.measure.perplexity import perplexity
from hf_pqcache.eval.session import hub_data
from hf_pqcache.eval.session.caches import CacheSpec, kv_numbers_per_token
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.texts import read_text
from hf_pqcache.models.positions import check_positions

if TYPE_CHECKING:
    from hf_pqcache.eval.session.setup import Setup

SPLITS = ("train", "validation", "test")
#: "cache" runs the real cache; the others are those of `perplexity`, which simulates it.
MODES = ("exact", "distort", "stream", "cache")
#: Windows that run together on a GPU: so many at most, and no more than fill so many bytes as exact keys and values.
_WINDOWS, _WINDOW_BYTES = 16, 4 << 30


@dataclass(frozen=True)
class TextTask:
    """Perplexity of a text.

    Attributes:
        name: also the name of the data set's configuration on the Hub.
        version: raised whenever a change here could change a figure.
        files: split -> name of the plain file as published. folders: names its folder goes by.
        path, config, revision, column: where `datasets` finds the rows.
        rows: lines of a plain file (line ends kept) -> the data set's rows, the same as the Hub's.
        join: rows -> the text, in the way that published figures are made.
    """

    name: str
    version: str
    files: dict[str, str]
    folders: tuple[str, ...]
    path: str
    config: str | None
    column: str
    rows: Callable[[list[str]], list[str]]
    join: Callable[[list[str]], str]
    revision: str | None = None

    def text(self, split: str = "test", data_dir: str | Path | None = None) -> str:
        """The text of a split.

        Args:
            data_dir: folder with the plain file or the Hub's parquet files; None asks the Hub through `datasets`.

        Raises:
            FileNotFoundError: data_dir holds no such file; the message has the names that were looked for.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; use one of {SPLITS}")
        if data_dir is None:
            data = hub_data.load(self.path, self.config, split=split, revision=self.revision)
            return self.join(list(data[self.column]))
        folders = [Path(data_dir, name) for name in (*self.folders, "")]
        for folder in folders:
            for path in (folder / self.files[split], folder / f"{self.files[split]}.xz"):
                if path.is_file():
                    return self.join(self.rows(read_text(path).splitlines(keepends=True)))
            if parts := sorted(folder.glob(f"{split}-*.parquet")):
                from pyarrow import parquet

                tables = (parquet.read_table(part, columns=[self.column]) for part in parts)
                return self.join([row for table in tables for row in table[self.column].to_pylist()])
        raise FileNotFoundError(
            f"{data_dir} holds no {self.files[split]} (nor {split}-*.parquet), looked for in it and in {list(self.folders)}"
        )

    def run(self, session: Session, *, split: str = "test", data_dir: str | Path | None = None, **options: Any) -> Row:
        """Perplexity of a split; `options` are those of `run_perplexity`."""
        return run_perplexity(session, self.name, self.version, self.text(split, data_dir), split=split, **options)


def mode_of(spec: CacheSpec, mode: str | None, chunk: int | None, prompt: int | None = None) -> str:
    """How the perplexity of a cache is computed: `mode`, or the cache's own, or cache where there is a prompt or a press.

    Raises ValueError for a mode that the cache cannot serve, and for a `chunk` or `prompt` in one that has none.
    """
    is_simulated = spec.name == "pq"
    if mode is None and (spec.press or prompt is not None):
        mode = "cache"
    if mode not in (None, "cache") and (spec.press or prompt is not None):
        raise ValueError(f"mode {mode} takes a window at once and has no prompt to prune: use mode cache")
    mode = mode or ("stream" if is_simulated else "exact" if spec.name == "dynamic" else "cache")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {MODES}")
    if (mode == "exact" and spec.name != "dynamic") or (mode in ("stream", "distort") and not is_simulated):
        raise ValueError(f"mode={mode!r} says nothing about {spec.label}: use cache, or exact without compression")
    if mode != "cache" and chunk is not None:
        raise ValueError(f"chunk={chunk} does nothing in mode {mode}, which takes a window at once: use mode cache")
    return mode


def check_perplexity(
    task: TextTask,
    setup: Setup,
    *,
    window: int | None = None,
    stride: int | None = None,
    mode: str | None = None,
    chunk: int | None = None,
    limit: int | None = None,
    prompt: int | None = None,
    split: str = "test",
    data_dir: str | Path | None = None,
) -> int:
    """The window that `run_perplexity` is to take for these options: theirs, or what model config, model and text allow.

    Raises ValueError or FileNotFoundError for what would fail or mean nothing once the model is loaded.
    """
    spec = setup.specs[0]
    mode_of(spec, mode, chunk, prompt)
    available = token_ids(setup.tokenizer, task.text(split, data_dir)).numel()
    found = min(setup.window, available) if window is None else window
    check_positions(found, setup.limit, "a perplexity window", "--window")
    spec.check_room(found)
    if prompt is not None and prompt > found - 2:
        raise ValueError(f"prompt={prompt} leaves nothing to score in a window of {found}: use {found - 2} or less")
    if not 1 <= (stride or found) <= found:
        raise ValueError(f"stride={stride} and window={found}: use a stride from 1 to the window")
    if available < found:
        raise ValueError(f"{task.name} has {available} tokens, less than a window of {found}: use --window {available}")
    return found


def _windows_at_once(session: Session, window: int) -> int:
    """On a CPU, and where rows share a scale (fp8) or centroids (pq that learns), one."""
    if (
        session.device.type == "cpu"
        or session.cache.name == "fp8"
        or (session.cache.name == "pq" and session.cache.codebook is None)
    ):
        return 1
    size = kv_numbers_per_token(session.model) * session.model.dtype.itemsize * window
    return max(1, min(_WINDOWS, _WINDOW_BYTES // size)) if size else 1


def run_perplexity(
    session: Session,
    name: str,
    version: str,
    text: str | torch.Tensor,
    *,
    window: int = 2048,
    stride: int | None = None,
    mode: str | None = None,
    chunk: int | None = None,
    limit: int | None = None,
    prompt: int | None = None,
    **settings: Any,
) -> Row:
    """One row: the perplexity of `text` (or token ids, int64 (N)) under the session's cache.

    Args:
        mode: exact (dynamic caches only), distort, stream (pq only) or cache. None means exact for a dynamic cache, stream
            for pq, and cache for every other.
        chunk: tokens of a step in mode cache after the first, CHUNK if None; in the others it must be None.
        limit: windows to measure; None measures the whole text.
        prompt: tokens of a window that come at once, and are pruned where the cache has a press; only those behind them are
            scored. None is half a window under a press, else nothing. In mode cache.
        settings: more of the row's settings.

    Raises ValueError for a mode that the cache cannot serve.
    """
    spec = session.cache
    mode = mode_of(spec, mode, chunk, prompt)
    prompt = window // 2 if prompt is None and spec.press else prompt
    settings |= {"window": window, "stride": stride or window, "mode": mode, "limit": limit}
    settings |= {"chunk": chunk or CHUNK, "prefill": prompt or PREFILL} if mode == "cache" else {}
    settings |= {} if prompt is None else {"prompt": prompt}
    data = text.numpy().tobytes() if isinstance(text, torch.Tensor) else text.encode()
    settings["text_sha256"] = hashlib.sha256(data).hexdigest()[:16]
    row = session.row(name, version, "perplexity", **settings)

    def run() -> list[float]:
        model, ids = session.model, text if isinstance(text, torch.Tensor) else token_ids(session.tokenizer, text)
        if ids.numel() < window:
            raise ValueError(f"{name} has {ids.numel()} tokens, less than a window of {window}: use a longer text")
        common: dict[str, Any] = {"window": window, "stride": stride, "max_windows": limit, "progress": session.progress}
        at_once = _windows_at_once(session, window) if mode == "cache" else 1
        common["each"] = shares.figures(session, [row.key, str(at_once)], name=name, unit="window")
        if mode == "cache":
            steps: dict[str, Any] = {"chunk": chunk or CHUNK, "prefill": prompt or PREFILL, "is_prompt": prompt is not None}
            steps["batch"] = at_once
            return [cache_perplexity(model, ids, lambda n, rows: spec.make(model, n, rows), **steps, **common)]
        config = spec.config if spec.name == "pq" else None
        options: dict[str, Any] = {"mode": mode, "codebook": spec.codebook, "config": config}
        return [perplexity(model, None, ids, **options, **common).value]

    return session.measure([row], run, true_bits=None if mode == "cache" else _bits(session, window))[0]


def _bits(session: Session, window: int) -> float | None:
    """Bits of each number of a cache that is simulated, everything counted, after `window` tokens; None where none is."""
    spec, config = session.cache, session.model.config
    if spec.name != "pq" or (spec.codebook is not None and not spec.codebook.is_normalised):
        return None
    planned = plan_memory(config, tokens=window, pq_config=spec.config, dtype_bytes=session.model.dtype.itemsize)
    return planned.bits("pq") if planned.values else None
