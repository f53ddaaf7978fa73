"""PagedPQCache and PagedKVCache: transformers caches whose full-attention layers live in pages, coded or exact."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hf_pqcache import attention, kernel_plan, parallel
from hf_pqcache.calibrate import learn_layer
from hf_pqcache.codebook import Codebook, most_bytes
from hf_pqcache.config import PQConfig, choose_page_size
from hf_pqcache.layer import PagedLayer
from hf_pqcache.pages import EXACT
from hf_pqcache.plan import DECODED, SingleAttention, why_exact
from hf_pqcache.sequences import SequenceCache
from hf_pqcache.steps import Steps
from hf_pqcache.storage import Storage


class PagedCache(SequenceCache, Cache):
    """What the two caches share: everything but what their pages hold.

    After an error the cache is as it was before the step, see `update`.
    """

    layers: list[Any]

    def __init__(
        self, config: PreTrainedConfig, layers: list[Any], chosen: list[int], storage: Storage, should_compile: bool
    ) -> None:
        """`chosen` of transformers' own `layers` are kept in pages."""
        text_config = config.get_text_config(decoder=True)
        implementation = text_config._attn_implementation
        self._exact = {i: why_exact(layer) for i, layer in enumerate(layers) if i not in chosen}
        self._reads_codes = attention.goes_through_interface(text_config)
        self._eager_because = self._why_eager(should_compile, [layers[i] for i in self._exact], storage)
        can_compile = self._eager_because is None
        self.storage = storage
        self._steps = Steps(storage)
        self._compressed = chosen
        for i in chosen:
            layers[i] = PagedLayer(storage, i, self._steps, can_compile, implementation)
        super().__init__(layers=layers)
        self._steps.exact_layers = self._stock_layers()
        self._attention = SingleAttention(config, len(layers))
        self._model_config = config
        attention.install(implementation)

    def _why_eager(self, should_compile: bool, exact_layers: list[Any], storage: Storage) -> str | None:
        """Why `generate` does not compile decode steps with this cache, if so."""
        if storage.offload is not None:
            return "offload=True: pages come from host memory step by step, which a captured graph cannot do"
        if not self._reads_codes:
            return DECODED
        if stock := sorted({type(layer).__name__ for layer in exact_layers if not layer.is_compileable}):
            return f"transformers' {', '.join(stock)} cannot be compiled"
        return None if should_compile else "compile=False, the default where no kernels serve or several processes share work"

    def _empty_twin(self) -> PagedCache:
        """A new cache of the same settings without tokens."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take the new keys and values of a layer.

        After PQC001, PQC004 or any other error raised here the cache is at the positions before the step, and usable. After
        an error elsewhere in the forward pass `get_seq_length` says these positions, too, and the next pass (or `crop`)
        takes back what some layers have stored. Tokens that return from a page to the window are restored as in `crop`.
        """
        if not torch.compiler.is_compiling():  # a compiled step has been through here before, eagerly
            self._prepare(layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _prepare(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Fit a layer to its first tokens. Raises ValueError where it cannot."""
        self._attention.check(layer_idx, getattr(self, "_is_user_defined", False))  # generate marks what it was given
        layer = self.layers[layer_idx]
        if isinstance(layer, PagedLayer) and not layer.is_initialized and (reason := self._why_unfit(keys, values)):
            self.layers[layer_idx] = DynamicLayer()
            self._compressed.remove(layer_idx)
            self._exact[layer_idx] = reason
            self._steps.exact_layers = self._stock_layers()

    def _why_unfit(self, keys: Tensor, values: Tensor) -> str | None:
        """Why pages cannot hold tokens like these, if so."""
        return None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions that the cache holds, left padding included: those that all its layers hold."""
        if layer_idx or torch.compiler.is_compiling() or not self.storage.views:
            return super().get_seq_length(layer_idx)
        return self._steps.complete()

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the next token. After compiled steps a device tensor, as StaticCache's: to read it would be a wait."""
        views = self.storage.views
        if not self.storage.is_stale or torch.compiler.is_compiling() or not views:
            return super().get_query_offset(layer_idx)
        return self.storage.device_position(layer_idx if layer_idx in views else min(views))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the sequences: page tables move, pages are shared by count, only exact windows are copied."""
        self._select(beam_idx.tolist())
        for layer in self._stock_layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; the copies share their pages."""
        self._select([row for row in range(self.storage.batch) for _ in range(repeats)])
        for layer in self._stock_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if self.storage.views:
            self._select(torch.arange(self.storage.batch)[indices.cpu()].tolist())
        for layer in self._stock_layers():
            layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove positions.

        Tokens that fall back into the exact window come back exactly where the window still has them, else as their
        pages have them. Raises ValueError for a positive number, whose meaning transformers has changed.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, how many tokens to remove")
        self.storage.check_rows_advance_together()
        self._steps.settle()
        with self.storage.out_of_memory_guard("restoring the exact windows"):
            if self.storage.is_uneven:
                self._steps.take_back()
            if tokens_to_remove and self.storage.views:
                self.storage.crop(max(0, self._steps.complete() + tokens_to_remove))
        for layer in self._stock_layers():
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens; memory and addresses stay."""
        self._steps.reset()
        self.storage.reset()
        self.forget_sequences()
        for layer in self._stock_layers():
            if isinstance(layer, DynamicLayer):  # transformers 5.17 would zero its tokens and keep their number
                layer.keys = layer.values = None
                layer.is_initialized = False
            layer.reset()

    def _select(self, indices: Sequence[int]) -> None:
        self.storage.check_rows_advance_together()
        self._steps.settle()
        if not self.storage.views:
            return
        with self.storage.out_of_memory_guard("the windows of other rows"):
            self.storage.select_rows(indices)
        for i in self._compressed:
            self.layers[i].batch_size = len(indices)

    def _stock_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PagedLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        self._steps.settle()
        new = self._empty_twin()
        memo[id(self)] = new
        with self.storage.out_of_memory_guard("a copy of the cache"):
            new._take_over(self.storage.clone(), self)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, PagedLayer):
                new.layers[i] = copy.deepcopy(layer, memo)
            elif layer.is_initialized:
                new.layers[i].adopt(layer)
        new._steps.exact_layers = new._stock_layers()
        return new

    def _take_over(self, storage: Storage, other: PagedCache) -> None:
        """Hold `storage`, the clone of another cache's, and the sequences in it."""
        self.storage = self._steps.storage = storage
        self._rows = dict(other._rows)
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.storage = storage

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it is memory of one process, made for one model. Use copy.deepcopy "
            "for a copy, and save codebooks with codebook.save_pretrained()"
        )

    def stats(self) -> dict[str, Any]:
        """Tokens, pages, true bytes by kind, the bytes an fp16 cache takes, which engine attends and why, and how often.

        `calls` counts launches from the host; replays of a captured CUDA graph do not pass there. `eager_because` says why
        decode steps are not compiled, None where they may be. With offload=True the pages, `codes` or `pages`, lie on the
        host, and `staging` is what the device holds of them; without, `bytes_host` is 0.
        """
        self._steps.settle()
        storage = self.storage
        used = storage.allocator.num_used
        pages = codebooks = windows = numbers = 0
        for layer, view in storage.views.items():
            pools = (view.key_pages, view.value_pages) if view.is_coded else ()
            pages += used * sum(pool[0].nbytes for pool in pools)
            # With kernels, a side's book holds its look-up table and its centroids.
            books = (view.key_centroids, view.value_centroids) if view.kernels is None else view.kernels.tensors
            codebooks += sum(book.nbytes for book in books)
            sides = (view.window_keys, view.window_values)
            windows += sum(w.nbytes for w in sides)
            numbers += sum(storage.row_lengths(layer)) * sum(w.shape[1] * w.shape[3] for w in sides)
        tables = sum(
            t.nbytes
            for state in storage.states.values()
            for t in (state.counts, state.starts, state.page_table, state.desc, state.flags)
        )
        calls: dict[str, int] = {}
        engines = {i: {"name": "exact", "reason": reason} for i, reason in self._exact.items()}
        if not self._reads_codes:
            engines |= {i: {"name": "decoded", "reason": DECODED} for i in self._compressed}
        for state in storage.states.values():
            engines |= {layer: choice._asdict() for (layer, _), choice in state.choices.items()}
            for (operation, engine), count in state.calls.items():
                calls[f"{operation}/{engine}"] = calls.get(f"{operation}/{engine}", 0) + count
        kind = "codes" if storage.codec.needs_centroids else "pages"
        staging = 0 if storage.offload is None else used * storage.offload.page_bytes()
        total, on_host = pages + codebooks + windows + tables + staging, 0 if storage.offload is None else pages
        return {
            "tokens": next((layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)), 0),
            "pages_used": used,
            "pages_free": storage.allocator.num_free,
            "bytes": {kind: pages, "staging": staging, "codebooks": codebooks, "window": windows, "tables": tables},
            "bytes_total": total,
            "bytes_device": total - on_host,
            "bytes_host": on_host,
            "bytes_fp16": 2 * numbers,
            "compressed_layers": list(self._compressed),
            "exact_layers": sorted(self._exact),
            "engines": engines,
            "eager_because": self._eager_because,
            "calls": calls,
        }


class PagedPQCache(PagedCache):
    """A KV cache that keeps old tokens as product-quantization codes and attends to them as they are.

    Args:
        config: the model's config (`model.config`).
        codebook: centroids, from `calibrate` or `Codebook.from_pretrained`. None learns them from the first tokens
            that the cache sees, and stays exact until there are enough.
        pq_config: shape of the cache; None means PQConfig(). A codebook decides num_subspaces and num_bits.
        compile: whether `generate` may compile the decode step. None means yes where a CUDA device is there and kernels
            serve the model's shape; models whose attention cannot be reached in compiled code never are, nor is anything
            with `offload`.
        offload: keep the pages in pinned host memory and bring a layer's to the device ahead of its turn: results are
            the same, the device needs room for the pages of two layers only, and every token costs a transfer of all
            codes; see offload.py.
        tp_rank: under tensor parallelism, this process's rank among those that share the model's KV heads: which heads
            of the codebook are its own. None takes torch.distributed's rank, if all its processes share them.
        expected_tokens: length of a sequence, prompt and new tokens together. `page_size="auto"` goes by it, see
            `choose_page_size`; a pool without room for one such sequence is refused at once.
        **overrides: single settings of PQConfig, e.g. `max_pages=4000`; also `page_size="auto"`.

    The pool never grows: a token that finds no page is refused with PagesExhaustedError (PQC001).

    Raises:
        ValueError: the codebook was made for another model, or a setting is out of range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codebook: Codebook | None = None,
        pq_config: PQConfig | None = None,
        *,
        compile: bool | None = None,
        offload: bool = False,
        tp_rank: int | None = None,
        expected_tokens: int | None = None,
        **overrides: Any,
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        if "page_size" in overrides:
            overrides["page_size"] = choose_page_size(overrides["page_size"], expected_tokens)
        settings = (pq_config or PQConfig()).replace(**overrides)
        if expected_tokens is not None:
            settings.check_room(expected_tokens)
        if codebook is not None:
            codebook.check_model(config)
            settings = settings.replace(num_subspaces=codebook.num_subspaces, num_bits=codebook.num_bits)
        layers: list[Any] = DynamicCache(config=config).layers
        chosen = [i for i in _full_attention(layers) if codebook is None or i in codebook.layers]
        if compile is None:
            compile = _kernels_serve(text_config, settings) and not parallel.is_one_of_several()
        self._settings, self._compile = settings, compile
        storage = Storage(settings, codebook, len(layers), learn_layer, tp_rank=tp_rank, offload=offload)
        super().__init__(config, layers, chosen, storage, compile)

    def _why_unfit(self, keys: Tensor, values: Tensor) -> str | None:
        try:
            self._settings.subspaces(keys.shape[3], values.shape[3])
        except ValueError as error:
            if self._settings.num_subspaces is not None:
                raise
            return str(error)
        return None

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        model: Any,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        compile: bool | None = None,
        offload: bool = False,
        tp_rank: int | None = None,
        **overrides: Any,
    ) -> PagedPQCache:
        """A cache for `model` (or its config) with a published codebook and the settings that came with it.

        Args:
            folder_or_repo_id: a folder that `Codebook.save_pretrained` wrote, or a repository of the Hub.
            revision: commit, branch or tag; pin a commit to be sure of the same codebook tomorrow.
            compile, offload, **overrides: as in the constructor; they win over the published settings.
            tp_rank: as in the constructor; None takes it from the model's device mesh, if it has one.

        Raises what `Codebook.from_pretrained` and the constructor raise. Nothing larger than a codebook of this model
        can be is downloaded.
        """
        config = getattr(model, "config", model)
        codebook = Codebook.from_pretrained(
            folder_or_repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            max_bytes=most_bytes(config),
        )
        tp_rank = parallel.rank_of(model) if tp_rank is None else tp_rank
        return cls(config, codebook, codebook.config, compile=compile, offload=offload, tp_rank=tp_rank, **overrides)

    def _empty_twin(self) -> PagedPQCache:
        storage = self.storage
        return type(self)(
            self._model_config,
            storage.codebook,
            self._settings,
            compile=self._compile,
            offload=storage.offload is not None,
            tp_rank=storage.tp_rank,
        )


class PagedKVCache(PagedCache):
    """A KV cache that keeps exact tokens in pages, and so takes memory as tokens arrive and shares common prefixes.

    Its window is a sequence's unfinished page; whole pages are never changed. Results are those of DynamicCache.

    Args:
        config: the model's config (`model.config`).
        page_size: tokens a page holds; a multiple of 16 from 16 to 512, or "auto".
        max_pages: pages of the preallocated pool, shared by all sequences of the cache. It never grows (PQC001).
        expected_tokens: as in PagedPQCache.
        compile: whether `generate` may compile the decode step. None means as for PagedPQCache.
        offload: keep the pages in pinned host memory, as in PagedPQCache.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        page_size: int | str = 64,
        max_pages: int = 1000,
        expected_tokens: int | None = None,
        compile: bool | None = None,
        offload: bool = False,
    ) -> None:
        page_size = choose_page_size(page_size, expected_tokens)
        settings = PQConfig(page_size=page_size, max_pages=max_pages, sink_tokens=0, extended_residual=1)
        if expected_tokens is not None:
            settings.check_room(expected_tokens)
        layers: list[Any] = DynamicCache(config=config).layers
        if compile is None:
            compile = _kernels_serve(config.get_text_config(decoder=True), None) and not parallel.is_one_of_several()
        self._settings, self._compile = settings, compile
        storage = Storage(settings, None, len(layers), learn_layer, EXACT, offload=offload)
        super().__init__(config, layers, _full_attention(layers), storage, compile)

    def _empty_twin(self) -> PagedKVCache:
        settings = self._settings
        return type(self)(
            self._model_config,
            page_size=settings.page_size,
            max_pages=settings.max_pages,
            compile=self._compile,
            offload=self.storage.offload is not None,
        )


def _full_attention(layers: Sequence[Any]) -> list[int]:
    """The layers that keep every token; transformers' own layers stay for sliding windows and linear attention."""
    return [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _kernels_serve(text_config: PreTrainedConfig, settings: PQConfig | None) -> bool:
    """Whether decode attention of this model would run on CUDA kernels here, as far as its config tells.

    settings: what decides the shape of codes; None for exact pages.
    """
    if not torch.cuda.is_available():
        return False
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    group = heads // (getattr(text_config, "num_key_value_heads", None) or heads)
    dtype = getattr(text_config, "dtype", None) or torch.float16
    device = torch.device("cuda", torch.cuda.current_device())
    if settings is None:
        return kernel_plan.select_paged(head_dim, head_dim, group, dtype, device).name != "torch"
    try:
        num_subspaces = settings.subspaces(head_dim)
    except ValueError:  # this head_dim cannot be cut so; the layers will say it
        return False
    choice = kernel_plan.select(head_dim, head_dim, num_subspaces, settings.num_bits, group, dtype, device)
    return choice.name != "torch"
