"""What a model's layers put into a cache for a text: sampled a few layers at a time; knows no codebook and no cache of ours.

A sample of a large model is larger than most machines' memory (Llama-2-7B, 65,536 tokens: 34 GB). So the text goes through
the model once for every group of layers whose keys and values fit, and nothing is kept but what its reader keeps.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from hf_pqcache import arguments
from hf_pqcache.config import PQConfig
from hf_pqcache.models.identity import dtype_name, weights_fingerprint
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.models.positions import check_positions, max_positions
from hf_pqcache.models.support import full_attention

#: Default window: long enough for positions to vary, short enough for every model that is in use.
WINDOW = 2048
#: Samples that are in memory at once: this share of what is free, and no more than so many bytes.
_FREE_SHARE, _MOST_BYTES = 0.25, 8 << 30
#: (KV heads, numbers in a key, numbers in a value) of a layer.
Shape = tuple[int, int, int]


class Samples(Protocol):
    """Keys and values of calibration text, ready for k-means.

    Attributes:
        metadata: where they come from: model, tokens, window, seed, hash of the text, versions. JSON values only.
        shapes: by layer index, in rising order. tokens: how many were sampled.
    """

    @property
    def metadata(self) -> dict[str, Any]: ...

    @property
    def shapes(self) -> dict[int, Shape]: ...

    @property
    def tokens(self) -> int: ...

    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index, keys (H, N, dk), values (H, N, dv)) of every layer, float16 on the CPU, one layer after the other."""
        ...


class LiveSamples:
    """Samples that are taken while they are read.

    Args:
        max_bytes: of the samples in memory at once; None means a quarter of the free memory, at most 8 GiB. Where they are
            more, the text goes through the model several times; what is sampled is the same.
        The others are those of `hf_pqcache.codebook.calibrate`.

    Raises:
        ValueError: the text has fewer tokens than a page, the window is longer than the model can hold, the model has
            no full-attention layer, or its heads are spread over processes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: str | Iterable[str] | Tensor,
        config: PQConfig | None = None,
        *,
        num_tokens: int = 65536,
        window: int | None = None,
        seed: int = 0,
        progress: bool = True,
        max_bytes: int | None = None,
    ) -> None:
        arguments.check_model(model, tokenizer)
        arguments.check_pq_config(config)
        config = config or PQConfig()
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise ValueError(
                f"the model's heads are spread over {model._tp_size} processes, and a codebook holds those of all: calibrate "
                "with the model in one process (device_map='auto' spreads its layers), and load the codebook in each"
            )
        self.model, self.seed, self.progress, self.max_bytes = model, seed, progress, max_bytes
        self.ids, text_sha256 = _tokens_of(tokenizer, texts)
        limit = max_positions(model.config)
        check_positions(window or 0, limit, "a calibration window", "window")
        self.window = min(window or WINDOW, self.ids.numel(), limit or WINDOW)
        self.skip = config.sink_tokens
        if self.window < self.skip + config.page_size:
            raise ValueError(
                f"the text has {self.ids.numel()} tokens, windows {self.window}: {self.skip} sinks and a page of "
                f"{config.page_size} need more; give more text, or use a smaller page_size"
            )
        available = max(1, self.ids.numel() // self.window)
        self.num_windows = min(-(-num_tokens // (self.window - self.skip)), available)
        self._tokens = min(num_tokens, self.num_windows * (self.window - self.skip))
        self.shapes = self._probe()
        self.metadata = {
            "model": _model_name(model),
            "tokens": self.tokens,
            "window": self.window,
            "skipped_tokens_per_window": self.skip,
            "seed": seed,
            "text_sha256": text_sha256,
            "model_fingerprint": weights_fingerprint(model),
            "dtype": dtype_name(model),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @property
    def tokens(self) -> int:
        return self._tokens

    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for group in self._groups():
            taken = self._take(group)
            for i in group:
                yield i, *taken.pop(i)  # pop: a layer that has been read is forgotten

    def _probe(self) -> dict[int, Shape]:
        """Shapes of the layers that keep keys and values of their own: some share those of another."""
        chosen = compressible_layers(self.model.config)
        if not chosen:
            raise ValueError(f"{type(self.model).__name__} has no full-attention layer, so there is nothing to compress")
        with _evaluating(self.model):
            cache = self._forward(self.ids[:2])
        found = {i: cache.layers[i] for i in chosen}
        own = {i: x for i, x in found.items() if getattr(x, "is_initialized", False) and x.keys.dim() == 4}
        return {i: (x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for i, x in own.items()}

    def _groups(self) -> Iterator[list[int]]:
        """The layers, in groups whose samples fit in memory together; one at a time where not even two do."""
        most = self.max_bytes
        if most is None:
            most = min(_MOST_BYTES, int(_FREE_SHARE * psutil.virtual_memory().available))
        group: list[int] = []
        taken = 0
        for i, (heads, dk, dv) in self.shapes.items():
            size = 2 * heads * (dk + dv) * self.tokens
            if group and taken + size > most:
                yield group
                group, taken = [], 0
            group.append(i)
            taken += size
        yield group

    def _take(self, group: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of these layers, for which the text goes through the model once."""
        taken = {
            i: (torch.empty(h, self.tokens, dk, dtype=torch.float16), torch.empty(h, self.tokens, dv, dtype=torch.float16))
            for i, (h, dk, dv) in ((i, self.shapes[i]) for i in group)
        }
        name = "sampling keys and values" + (f" of layers {group[0]} to {group[-1]}" if len(group) < len(self.shapes) else "")
        windows = _windows(self.ids, self.window, self.num_windows, self.seed)
        begin = 0
        with _evaluating(self.model):
            for row in tqdm(windows, name, self.num_windows, unit="window", disable=not self.progress, leave=False):
                cache = self._forward(row)
                end = min(self.tokens, begin + row.numel() - self.skip)
                for i, (keys, values) in taken.items():
                    layer: Any = cache.layers[i]
                    keys[:, begin:end] = layer.keys[0, :, self.skip : self.skip + end - begin].half()
                    values[:, begin:end] = layer.values[0, :, self.skip : self.skip + end - begin].half()
                begin = end
        return taken

    def _forward(self, row: Tensor) -> Any:
        """A cache that has seen the tokens of `row` (n)."""
        body = getattr(self.model, "base_model", self.model)  # without the language-model head, whose logits nobody reads
        extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(body.forward).parameters else {}
        cache = DynamicCache(config=self.model.config)
        ids = row[None].to(next(self.model.parameters()).device)
        body(input_ids=ids, **cache_kwargs(cache, body), use_cache=True, **extra)
        return cache


@dataclass(frozen=True)
class KeptSamples:
    """Samples in a safetensors file, read a layer at a time. Raises ValueError if the file holds none."""

    path: Path

    def __post_init__(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("samples") is None:
                raise ValueError(f"{self.path} holds no sampled keys and values; sample them again")

    @property
    def metadata(self) -> dict[str, Any]:
        with safe_open(self.path, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["samples"])
        return found

    @property
    def shapes(self) -> dict[int, Shape]:
        with safe_open(self.path, framework="pt") as file:
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
        layers = sorted(int(name.partition(".")[2]) for name in sizes if name.startswith("keys."))
        return {i: (sizes[f"keys.{i}"][0], sizes[f"keys.{i}"][2], sizes[f"values.{i}"][2]) for i in layers}

    @property
    def tokens(self) -> int:
        return int(self.metadata["tokens"])

    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        with safe_open(self.path, framework="pt") as file:
            for i in self.shapes:
                yield i, file.get_tensor(f"keys.{i}"), file.get_tensor(f"values.{i}")


def keep(samples: Samples, path: str | Path, metadata: Mapping[str, Any] | None = None) -> KeptSamples:
    """Write samples to a safetensors file, a layer at a time; `metadata` is added to theirs. A torn file never has its name.

    The format is simple enough to be written without all tensors in hand: a length, a JSON header, the numbers.
    """
    path, begin = Path(path), 0
    header: dict[str, Any] = {"__metadata__": {"samples": json.dumps({**samples.metadata, **(metadata or {})})}}
    for i, (heads, dk, dv) in samples.shapes.items():
        for name, width in ((f"keys.{i}", dk), (f"values.{i}", dv)):
            end = begin + 2 * heads * samples.tokens * width
            header[name] = {"dtype": "F16", "shape": [heads, samples.tokens, width], "data_offsets": [begin, end]}
            begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torn = path.with_suffix(".part")
    try:
        with open(torn, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, keys, values in samples.layers():
                for x in (keys, values):
                    file.write(x.contiguous().numpy().astype("<f2", copy=False).tobytes())
        torn.replace(path)
    finally:
        torn.unlink(missing_ok=True)
    return KeptSamples(path)


def compressible_layers(config: Any) -> list[int]:
    """Indices of the layers whose cache keeps every token (full attention), by transformers' own plan for the model."""
    return full_attention(config, DynamicCache(config=config).layers)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inference, the model in eval mode; afterwards it is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _model_name(model: Any) -> str:
    """Hub id of the model, or the bare name of its local folder: a codebook may be published, a path should not be."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name


def _tokens_of(tokenizer: Any, texts: str | Iterable[str] | Tensor) -> tuple[Tensor, str]:
    """(all documents as one row of token ids (N) int64, an end-of-text token between two; hash of what was given)."""
    if isinstance(texts, Tensor):
        return texts, hashlib.sha256(texts.to(torch.int64).numpy().tobytes()).hexdigest()
    documents = [texts] if isinstance(texts, str) else list(texts)
    ids: list[int] = []
    for i, document in enumerate(documents):
        if i and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64), hashlib.sha256("\0".join(documents).encode()).hexdigest()


def _windows(ids: Tensor, window: int, num_windows: int, seed: int) -> Iterator[Tensor]:
    """A seeded choice of `num_windows` of the text's windows, in the order of the text."""
    available = max(1, ids.numel() // window)
    generator = torch.Generator().manual_seed(seed)
    for i in sorted(torch.randperm(available, generator=generator)[:num_windows].tolist()):
        yield ids[i * window : (i + 1) * window]
