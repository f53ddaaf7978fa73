"""Model + text -> sampled keys and values -> k-means -> Codebook; knows no page and no cache of ours."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_pqcache import arguments
from hf_pqcache.codebook import Codebook, LayerCodebook, to_float16
from hf_pqcache.config import PQConfig
from hf_pqcache.hf_names import cache_kwargs
from hf_pqcache.kmeans import Objective, kmeans

#: Lloyd steps. 12, 25 and 75 of them cost +0.26, +0.23 and +0.22 % of perplexity at 4 bits, in 3, 5 and 13 s on a GPU
#: (12 M-parameter Llama, WikiText-2 in stream mode, 65 536 calibration tokens).
ITERATIONS = 25
#: Default window: long enough for positions to vary, short enough for every model that is in use.
WINDOW = 2048


def compressible_layers(config: Any) -> list[int]:
    """Indices of the layers whose cache keeps every token (full attention), by transformers' own plan for the model."""
    return [i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]


@dataclass(frozen=True)
class Samples:
    """Keys and values of calibration text, ready for k-means.

    Attributes:
        keys, values: float16 (H, N, d) on the CPU by layer; N is the same in all of them.
        metadata: where they come from: model, tokens, window, seed, hash of the text, versions. JSON values only.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {f"{kind}.{i}": x for kind, side in (("keys", self.keys), ("values", self.values)) for i, x in side.items()}
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata={"samples": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> Samples:
        """Inverse of `save`. Raises ValueError if the file holds no samples."""
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("samples")
            if metadata is None:
                raise ValueError(f"{path} holds no sampled keys and values; sample them again")
            for name in file.keys():  # noqa: SIM118 - not a dict
                kind, _, index = name.partition(".")
                (keys if kind == "keys" else values)[int(index)] = file.get_tensor(name)
        return cls(keys, values, json.loads(metadata))


def sample(
    model: Any,
    tokenizer: Any,
    texts: str | Iterable[str],
    config: PQConfig | None = None,
    *,
    num_tokens: int = 65536,
    window: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Samples:
    """First half of `calibrate`, with the same arguments: what the model's layers put into a cache.

    Raises:
        ValueError: the text has fewer tokens than centroids, the model has no full-attention layer, or its heads are
            spread over processes.
    """
    arguments.check_model(model, tokenizer)
    arguments.check_pq_config(config)
    config = config or PQConfig()
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"the model's heads are spread over {model._tp_size} processes, and a codebook holds those of all: calibrate "
            "with the model in one process (device_map='auto' spreads its layers), and load the codebook in each"
        )
    layers = compressible_layers(model.config)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no full-attention layer, so there is nothing to compress")
    documents = [texts] if isinstance(texts, str) else list(texts)
    ids = _token_ids(tokenizer, documents)
    window = min(window or WINDOW, ids.numel())
    if ids.numel() < config.num_centroids or window <= config.sink_tokens:
        raise ValueError(
            f"the text has {ids.numel()} tokens; {config.num_centroids} centroids need at least as many, and "
            f"{4 * config.num_centroids} or more to be of use: give more text or use fewer bits a code"
        )
    keys, values = _sample(model, ids, layers, config.sink_tokens, window, num_tokens, seed, progress)
    metadata = {
        "model": _model_name(model),
        "tokens": next(iter(keys.values())).shape[1],
        "window": window,
        "skipped_tokens_per_window": config.sink_tokens,
        "seed": seed,
        "text_sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Samples(keys, values, metadata)


def learn(
    samples: Samples,
    config: PQConfig | None = None,
    *,
    merge: bool = False,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Codebook:
    """Second half of `calibrate`: k-means over samples.

    Args:
        merge: learn one set of centroids for all layers and heads, from an equal share of samples of each (as MILLION
            does, Wang et al. 2025); for comparison, it costs more than twice the loss.
        device: where k-means runs.

    Raises:
        ValueError: num_subspaces does not divide head_dim, samples are not finite, or layers that were to be merged
            differ in head_dim.
    """
    config = config or PQConfig()
    books: dict[int, LayerCodebook] = {}
    options: dict[str, Any] = {"objective": objective, "iterations": iterations}
    problems = {0: _merged(samples, seed)} if merge else {i: (samples.keys[i], samples.values[i]) for i in sorted(samples.keys)}
    total = sum(2 * keys.shape[0] * config.subspaces(keys.shape[2], values.shape[2]) for keys, values in problems.values())
    with tqdm(total=total, desc="k-means", unit="subspace", disable=not progress, leave=False) as bar:
        for i, (keys, values) in problems.items():
            name = "all layers" if merge else f"layer {i}"
            sides = (keys.to(device), values.to(device))
            layer = learn_layer(*sides, config, seed=seed * 65_537 + i, progress=bar.update, name=name, **options)
            books[i] = layer.to("cpu")
    if merge:
        one = books[0]
        books = {
            i: LayerCodebook(one.keys.repeat(k.shape[0], 1, 1, 1), one.values.repeat(k.shape[0], 1, 1, 1))
            for i, k in samples.keys.items()
        }
    return Codebook(
        layers=books,
        num_bits=config.num_bits,
        num_subspaces=config.num_subspaces,
        metadata={**samples.metadata, "objective": objective, "iterations": iterations, "merged": merge},
    )


def _merged(samples: Samples, seed: int) -> tuple[Tensor, Tensor]:
    """An equal share of every layer's and head's samples as one head: keys (1, N, d) and values (1, N, dv)."""
    shapes = {(k.shape[2], samples.values[i].shape[2]) for i, k in samples.keys.items()}
    if len(shapes) > 1:
        raise ValueError(f"layers of different head_dim {sorted(shapes)} cannot share one codebook; leave them apart")
    num_heads = sum(k.shape[0] for k in samples.keys.values())
    num_tokens = next(iter(samples.keys.values())).shape[1]
    generator = torch.Generator().manual_seed(seed)
    keys, values = [], []
    for i in sorted(samples.keys):
        chosen = torch.randperm(num_tokens, generator=generator)[: -(-num_tokens // num_heads)]
        keys.append(samples.keys[i][:, chosen].flatten(0, 1))
        values.append(samples.values[i][:, chosen].flatten(0, 1))
    return torch.cat(keys)[None], torch.cat(values)[None]


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: str | Iterable[str],
    config: PQConfig | None = None,
    *,
    num_tokens: int = 65536,
    window: int | None = None,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    merge: bool = False,
    progress: bool = True,
) -> Codebook:
    """Learn a codebook for `model` from text that its evaluation never sees.

    The text is cut into windows; a seeded choice of them goes through the model, each with fresh context, and the keys
    (after their rotary embedding) and values of every full-attention layer are kept in float16 in host memory:
    num_tokens * 2 bytes * all key and value numbers of a token. The first `sink_tokens` of a window are left out: a
    cache keeps them exact, and their keys and values are like no others. Then one k-means runs for every layer, KV
    head, keys or values, and subspace (`kmeans`), on the model's device. `sample` and `learn` are its two halves.

    Args:
        model: a transformers causal language model, in any dtype, on any device.
        tokenizer: its tokenizer.
        texts: one text or several documents, which are joined by the tokenizer's end-of-text token.
        config: shape of the codes (num_subspaces, num_bits) and sink_tokens. None means PQConfig().
        num_tokens: how many tokens to sample; fewer if the text is shorter.
        window: tokens of one window; the model's training length is best. None means 2048.
        seed: of the choice of windows and of k-means.
        objective: "tail" or "plain", see `kmeans`.
        iterations: Lloyd steps.
        merge: one set of centroids for all layers and heads, see `learn`.
        progress: show progress bars.

    Raises:
        ValueError: the text has fewer tokens than centroids, the model has no full-attention layer, num_subspaces does
            not divide its head_dim, or keys or values are not finite in float16.
    """
    samples = sample(model, tokenizer, texts, config, num_tokens=num_tokens, window=window, seed=seed, progress=progress)
    device = next(model.parameters()).device
    options: dict[str, Any] = {"objective": objective, "iterations": iterations, "merge": merge}
    return learn(samples, config, seed=seed, device=device, progress=progress, **options)


def learn_layer(
    keys: Tensor,
    values: Tensor,
    config: PQConfig,
    *,
    seed: int = 0,
    objective: Objective = "tail",
    iterations: int = ITERATIONS,
    progress: Callable[[int], object] | None = None,
    name: str = "layer",
) -> LayerCodebook:
    """Centroids of one layer from samples: keys (H, N, d), values (H, N, dv) float -> LayerCodebook on their device.

    Raises ValueError if N is below the number of centroids, a sample is not finite or a centroid overflows float16.
    """
    num_subspaces = config.subspaces(keys.shape[2], values.shape[2])
    sides = []
    for kind, x in enumerate((keys, values)):
        heads, tokens, _ = x.shape
        parts = x.view(heads, tokens, num_subspaces, -1).transpose(1, 2).flatten(0, 1)  # (H * M, N, width)
        centroids = kmeans(
            parts,
            config.num_centroids,
            objective=objective,
            iterations=iterations,
            seed=2 * seed + kind,
            progress=progress,
        )
        sides.append(to_float16(centroids.unflatten(0, (heads, num_subspaces)), f"{name} {('keys', 'values')[kind]}"))
    return LayerCodebook(*sides)


def _model_name(model: Any) -> str:
    """Hub id of the model, or the bare name of its local folder: a codebook may be published, a path should not be."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name


def _token_ids(tokenizer: Any, documents: list[str]) -> Tensor:
    """All documents as one row of token ids (N) int64, an end-of-text token between two."""
    ids: list[int] = []
    for i, document in enumerate(documents):
        if i and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _windows(ids: Tensor, window: int, num_windows: int, seed: int) -> Iterator[Tensor]:
    """A seeded choice of `num_windows` of the text's windows, in the order of the text."""
    available = max(1, ids.numel() // window)
    generator = torch.Generator().manual_seed(seed)
    for i in sorted(torch.randperm(available, generator=generator)[:num_windows].tolist()):
        yield ids[i * window : (i + 1) * window]


@torch.inference_mode()
def _sample(
    model: Any, ids: Tensor, layers: list[int], skip: int, window: int, num_tokens: int, seed: int, progress: bool
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys and values of up to num_tokens tokens by layer: float16 (H, N, d) on the CPU; empty layers are absent."""
    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)  # without the language-model head, whose logits nobody reads
    accepts = inspect.signature(body.forward).parameters
    extra = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
    num_windows = min(-(-num_tokens // (window - skip)), max(1, ids.numel() // window))
    pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}
    was_training = model.training
    model.eval()
    try:
        chosen = tqdm(
            _windows(ids, window, num_windows, seed),
            total=num_windows,
            desc="sampling keys and values",
            unit="window",
            disable=not progress,
            leave=False,
        )
        for row in chosen:
            cache = DynamicCache(config=model.config)
            body(input_ids=row[None].to(device), **cache_kwargs(cache, body), use_cache=True, **extra)
            for i in layers:
                layer: Any = cache.layers[i]
                if not getattr(layer, "is_initialized", False) or layer.keys.dim() != 4:
                    continue  # this layer shares another one's keys and values
                pieces.setdefault(i, []).append((layer.keys[0, :, skip:].half().cpu(), layer.values[0, :, skip:].half().cpu()))
    finally:
        model.train(was_training)
    keys = {i: torch.cat([k for k, _ in p], 1)[:, :num_tokens] for i, p in pieces.items()}
    values = {i: torch.cat([v for _, v in p], 1)[:, :num_tokens] for i, p in pieces.items()}
    return keys, values
