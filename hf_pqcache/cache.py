"""PagedPQCache: a transformers Cache whose full-attention layers store product-quantization codes in pages."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

import hf_pqcache.ops  # noqa: F401 - registers the ops
from hf_pqcache import attention, cuda_engine, torch_engine
from hf_pqcache.calibrate import learn_layer
from hf_pqcache.codebook import Codebook, most_bytes
from hf_pqcache.config import PQConfig
from hf_pqcache.handles import KEY, KVHandle, LazyKV
from hf_pqcache.plan import DECODED, SingleAttention, why_exact
from hf_pqcache.storage import Storage


class PQLayer(CacheLayerMixin):
    """One compressed layer: hands handles to attention, tokens to the storage that all layers of the cache share."""

    is_sliding = False
    is_croppable = True

    def __init__(self, storage: Storage, index: int, pending: list[PQLayer], is_compileable: bool, implementation: Any) -> None:
        self.storage = storage
        self.index = index
        self.is_compileable = is_compileable
        self._all_pending = pending
        self._implementation = implementation
        self._pending: tuple[Tensor, Tensor] | None = None
        self._is_traceable = False
        super().__init__()

    # Encoder-decoder models and a few others look at the tensors of a layer.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self._whole(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self._whole(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @staticmethod
    def _refuse_assignment(value: Tensor | None) -> None:
        if value is not None:
            raise AttributeError("a compressed layer's keys and values cannot be assigned; pass new tokens to update()")

    def _whole(self, which: int) -> Tensor | None:
        if not self.is_initialized:
            return None
        self.commit()
        return self._decoded(which)

    def _decoded(self, which: int) -> Tensor:
        storage = self.storage
        side: torch_engine.Which = "key" if which == KEY else "value"
        total = storage.tokens(self.index)
        storage.state(self.index).calls["dense", "torch"] += 1
        return torch_engine.dense(storage.views[self.index], side, storage.row_lengths(self.index), storage.starts, total)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._open(key_states, value_states)

    @torch.compiler.disable
    def _open(self, keys: Tensor, values: Tensor) -> None:
        self.storage.open(self.index, keys, values)
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size = keys.shape[0]
        # Plain torch reads lengths on the host, which a CUDA graph cannot: there a compiled model breaks its graph here.
        self._is_traceable = keys.device.type == "cpu" or self.storage.views[self.index].kernels is not None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take new keys and values (B, H, T, d); returns handles that attention reads codes through.

        Several tokens at once attend in full precision: they wait until attention has seen them, then are stored.
        """
        if torch.compiler.is_compiling() and key_states.shape[2] == 1 and self._is_traceable:
            return self._update_traced(key_states, value_states)
        return self._update_eager(key_states, value_states)

    def _update_traced(self, keys: Tensor, values: Tensor) -> tuple[KVHandle, KVHandle]:
        state = self.storage.state(self.index)
        torch.ops.hf_pqcache.append(keys, values, state.counts, state.desc, self.index)
        self.storage.is_stale = True
        return KVHandle(self, 0, keys), KVHandle(self, 1, values)

    @torch.compiler.disable
    def _update_eager(self, keys: Tensor, values: Tensor) -> tuple[LazyKV, LazyKV]:
        attention.install(self._implementation)
        for layer in list(self._all_pending):
            layer.commit()
        if not self.is_initialized:
            self._open(keys, values)
        storage, count = self.storage, keys.shape[2]
        total = storage.tokens(self.index) + count
        if count == 1 and total > 1:
            storage.learn_if_due(self.index, keys, values)
            storage.reserve(self.index, total)
            state = storage.state(self.index)
            torch.ops.hf_pqcache.append(keys, values, state.counts, state.desc, self.index)
            storage.advance(self.index, 1)
        else:
            self._pending = (keys, values)
            self._all_pending.append(self)
        return LazyKV(self, 0, keys, total), LazyKV(self, 1, values, total)

    def commit(self, mask: Tensor | None = None) -> None:
        """Store the tokens that attention has now seen. `mask` is what it was given; it tells left padding."""
        if self._pending is None:
            return
        (keys, values), self._pending = self._pending, None
        self._all_pending.remove(self)
        storage, first = self.storage, self.storage.tokens(self.index)
        with storage.out_of_memory_guard("encoding the new tokens"):
            padding = attention.leading_padding(mask, first, keys.shape[2], keys.shape[0])
            storage.note_padding(self.index, padding)
            storage.learn_if_due(self.index, keys, values)
            storage.append(self.index, keys, values)

    def offload(self) -> None:
        raise NotImplementedError(
            "a compressed layer does not move to the host as a whole: its codes are small, and layers share their pages; "
            "for more room lower num_bits, num_subspaces or max_pages"
        )

    prefetch = offload

    def discard_pending(self) -> None:
        self._pending = None

    # -- what handles ask ----------------------------------------------------------------------------------------
    def dense(self, which: int, new: Tensor) -> Tensor:
        """All keys (0) or values (1), (B, H, n, d): decoded past, then pending new tokens exactly."""
        if self._pending is None:
            return self._decoded(which)
        return new if self.storage.tokens(self.index) == 0 else torch.cat([self._decoded(which), new], dim=2)

    def dense_traced(self, which: int, new: Tensor) -> Tensor:
        state = self.storage.state(self.index)
        total = self.get_max_length()
        return torch.ops.hf_pqcache.dense(new, state.counts, state.desc, self.index, which, total)

    def attend(
        self, query: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, value_dim: int
    ) -> Tensor:
        """Attention of one query token (B, Hq, 1, d) over the layer -> (B, 1, Hq, dv)."""
        if self._pending is not None:  # a first prompt of a single token
            self.commit(mask)
        state = self.storage.state(self.index)
        return torch.ops.hf_pqcache.attend(query, state.counts, state.desc, mask, sinks, self.index, scale, softcap, value_dim)

    # -- what transformers asks ----------------------------------------------------------------------------------
    def get_seq_length(self) -> Any:
        if not self.is_initialized:
            return 0
        if torch.compiler.is_compiling():
            state = self.storage.state(self.index)
            return state.counts[self.index, 0, 0] + state.starts[0]
        pending = self._pending[0].shape[2] if self._pending is not None else 0
        return self.storage.tokens(self.index) + pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, 0). Constant for one-token steps of a compileable cache: a changing mask would be a new graph each."""
        if self.is_compileable and query_length == 1:
            if self.is_initialized and not torch.compiler.is_compiling():
                self.storage.before_step(self.index)
            return self.get_max_length(), 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.storage.max_tokens if self.is_compileable else -1


def _kernels_serve(text_config: PreTrainedConfig, settings: PQConfig) -> bool:
    """Whether decode attention of this model would run on CUDA kernels here, as far as its config tells."""
    if not torch.cuda.is_available():
        return False
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    group = heads // (getattr(text_config, "num_key_value_heads", None) or heads)
    dtype = getattr(text_config, "dtype", None) or torch.float16
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        shape = head_dim, head_dim, settings.subspaces(head_dim), settings.num_bits
    except ValueError:  # this head_dim cannot be cut so; the layers will say it
        return False
    return cuda_engine.select(*shape, group, dtype, device).name != "torch"


class PagedPQCache(Cache):
    """A KV cache that keeps old tokens as product-quantization codes and attends to them as they are.

    Args:
        config: the model's config (`model.config`).
        codebook: centroids, from `calibrate` or `Codebook.from_pretrained`. None learns them from the first tokens
            that the cache sees, and stays exact until there are enough.
        pq_config: shape of the cache; None means PQConfig(). A codebook decides num_subspaces and num_bits.
        compile: whether `generate` may compile the decode step. None means yes where a CUDA device is there and kernels
            serve the model's shape; models whose attention cannot be reached in compiled code never are.
        **overrides: single settings of PQConfig, e.g. `max_pages=4000`.

    Raises:
        ValueError: the codebook was made for another model, or a setting is out of range.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        codebook: Codebook | None = None,
        pq_config: PQConfig | None = None,
        *,
        compile: bool | None = None,
        **overrides: Any,
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        settings = (pq_config or PQConfig()).replace(**overrides)
        if codebook is not None:
            codebook.check_model(config)
            settings = settings.replace(num_subspaces=codebook.num_subspaces, num_bits=codebook.num_bits)
        layers: list[Any] = DynamicCache(config=config).layers
        chosen = [
            i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and (codebook is None or i in codebook.layers)
        ]
        self._exact = {i: why_exact(layer) for i, layer in enumerate(layers) if i not in chosen}
        self._reads_codes = attention.goes_through_interface(text_config)
        if compile is None:
            compile = _kernels_serve(text_config, settings)
        can_compile = compile and self._reads_codes and all(layers[i].is_compileable for i in self._exact)
        self.storage = Storage(settings, codebook, len(layers), learn_layer)
        self._pending: list[PQLayer] = []
        self._compressed = chosen
        implementation = text_config._attn_implementation
        for i in chosen:
            layers[i] = PQLayer(self.storage, i, self._pending, can_compile, implementation)
        super().__init__(layers=layers)
        self._attention = SingleAttention(config, len(layers))
        self._settings, self._compile, self._model_config = settings, compile, config
        attention.install(implementation)

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
        **overrides: Any,
    ) -> PagedPQCache:
        """A cache for `model` (or its config) with a published codebook and the settings that came with it.

        Args:
            folder_or_repo_id: a folder that `Codebook.save_pretrained` wrote, or a repository of the Hub.
            revision: commit, branch or tag; pin a commit to be sure of the same codebook tomorrow.
            compile, **overrides: as in the constructor; they win over the published settings.

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
        return cls(config, codebook, codebook.config, compile=compile, **overrides)

    def _settle(self) -> None:
        for layer in list(self._pending):
            layer.commit()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take the new keys and values of a layer. After PQC001 or PQC004 the cache is as it was before the step."""
        if not torch.compiler.is_compiling():  # a compiled step has been through here before, eagerly
            self._prepare(layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _prepare(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Fit a layer to the first tokens after it was made or reset. Raises ValueError where it cannot."""
        self._attention.check(layer_idx, getattr(self, "_is_user_defined", False))  # generate marks what it was given
        layer = self.layers[layer_idx]
        if not isinstance(layer, PQLayer):
            return
        if not layer.is_initialized:
            try:
                self._settings.subspaces(keys.shape[3], values.shape[3])
            except ValueError as error:
                if self._settings.num_subspaces is not None:
                    raise
                self.layers[layer_idx] = DynamicLayer()
                self._compressed.remove(layer_idx)
                self._exact[layer_idx] = str(error)
        elif layer.batch_size != keys.shape[0]:
            if layer.get_seq_length():
                raise ValueError(f"the cache holds {layer.batch_size} sequences, not {keys.shape[0]}; call reset() first")
            self._select([0] * keys.shape[0])  # empty rows, as many as there will be

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
        decoded codes. Raises ValueError for a positive number, whose meaning transformers has changed.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, how many tokens to remove")
        self._settle()
        if tokens_to_remove and self.storage.views:
            self.storage.crop(max(0, self.storage.tokens(next(iter(self.storage.views))) + tokens_to_remove))
        for layer in self._stock_layers():
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens; memory and addresses stay."""
        for layer in self._pending:
            layer.discard_pending()
        self._pending.clear()
        self.storage.reset()
        for layer in self._stock_layers():
            if isinstance(layer, DynamicLayer):  # transformers 5.17 would zero its tokens and keep their number
                layer.keys = layer.values = None
                layer.is_initialized = False
            layer.reset()

    def _select(self, indices: Sequence[int]) -> None:
        self._settle()
        if not self.storage.views:
            return
        self.storage.select_rows(indices)
        for i in self._compressed:
            self.layers[i].batch_size = len(indices)

    def _stock_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PQLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedPQCache:
        self._settle()
        new = type(self)(self._model_config, self.storage.codebook, self._settings, compile=self._compile)
        memo[id(self)] = new
        new.storage = self.storage.clone()
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, PQLayer):
                new.layers[i] = copy.deepcopy(layer, memo)
                continue
            new.layers[i].storage = new.storage
            if layer.is_initialized:
                new.layers[i].dtype, new.layers[i].device = layer.dtype, layer.device
                new.layers[i].batch_size, new.layers[i].is_initialized = layer.batch_size, True
                new.layers[i]._is_traceable = layer._is_traceable
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a PagedPQCache cannot be pickled: save its codebook with codebook.save_pretrained() instead")

    def stats(self) -> dict[str, Any]:
        """Tokens, pages, true bytes by kind, the bytes an fp16 cache takes, which engine attends and why, and how often.

        `calls` counts launches from the host; replays of a captured CUDA graph do not pass there.
        """
        self._settle()
        storage = self.storage
        used = storage.allocator.num_used
        codes = codebooks = windows = numbers = 0
        for layer, view in storage.views.items():
            coded_pages = (view.key_pages, view.value_pages) if view.is_coded else ()
            codes += used * sum(pages[0].numel() for pages in coded_pages)
            # With kernels, a side's book holds its look-up table and its centroids.
            books = (view.key_centroids, view.value_centroids) if view.kernels is None else view.kernels.tensors
            codebooks += sum(book.nbytes for book in books)
            sides = (view.window_keys, view.window_values)
            windows += sum(w.numel() * w.element_size() for w in sides)
            numbers += sum(storage.row_lengths(layer)) * sum(w.shape[1] * w.shape[3] for w in sides)
        tables = sum(
            t.numel() * t.element_size()
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
        return {
            "tokens": next((layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)), 0),
            "pages_used": used,
            "pages_free": storage.allocator.num_free,
            "bytes": {"codes": codes, "codebooks": codebooks, "window": windows, "tables": tables},
            "bytes_total": codes + codebooks + windows + tables,
            "bytes_fp16": 2 * numbers,
            "compressed_layers": list(self._compressed),
            "exact_layers": sorted(self._exact),
            "engines": engines,
            "calls": calls,
        }
