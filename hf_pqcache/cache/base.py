"""What the two paged caches share, PagedPQCache and PagedKVCache: everything but what their pages hold and how to make one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from hf_pqcache.attention import interface
from hf_pqcache.attention.lazy_kv import DECODED
from hf_pqcache.cache import stats
from hf_pqcache.cache.forward_pass import ForwardPass
from hf_pqcache.cache.hybrid import HybridLayer, paged_layer
from hf_pqcache.cache.layer import PagedLayer
from hf_pqcache.cache.portable import Portable
from hf_pqcache.cache.sequences import Sequences
from hf_pqcache.models.code import gives_attention_what_it_caches
from hf_pqcache.models.support import COPY, NO_POSITIONS, SingleAttention, layers_without_positions, why_exact
from hf_pqcache.storage.memory import out_of_memory_as_pqc004
from hf_pqcache.storage.storage import Storage


class PagedCache(Portable, DynamicCache):
    """What the two caches share: everything but what their pages hold.

    DynamicCaches to transformers, some of whose code takes no other: captioning models give one a second cache for the image,
    EncoderDecoderCache crops no other in assisted decoding.

    After an error the cache is as it was before the step, see `update`. A serving loop that handles sequences one by one
    uses `allocate_sequence` and what follows it in place of `generate`; a cache holds either such sequences or those of
    `generate`, never both.
    """

    layers: list[Any]

    def __init__(
        self, config: PreTrainedConfig, layers: list[Any], chosen: list[int], storage: Storage, should_compile: bool
    ) -> None:
        """`chosen` of transformers' own `layers` are kept in pages, in `storage`, which may hold tokens of theirs."""
        text_config = config.get_text_config(decoder=True)
        self._exact = {i: why_exact(layer) for i, layer in enumerate(layers) if i not in chosen}
        others = layers_without_positions(config)
        self._exact |= dict.fromkeys(others, NO_POSITIONS)
        self.storage = storage
        cache = weakref.ref(self)  # a cycle would keep the pool alive until the garbage collector comes
        self._pass = ForwardPass(storage, lambda: {} if (alive := cache()) is None else alive._stock_parts(), chosen)
        self._pass.without_positions |= others
        self._pass.why_never = self._why_never(should_compile, layers, storage)
        if not gives_attention_what_it_caches(text_config):  # until a pass has shown it
            self._pass.decoded = dict.fromkeys(chosen, DECODED)
        self._compressed = chosen
        for i in chosen:
            layers[i] = paged_layer(layers[i], i, self._pass, text_config)
        Cache.__init__(self, layers=layers)  # DynamicCache's would make layers of its own
        self._sequences = Sequences(self._pass, self.layers, chosen, {})
        self._attention = SingleAttention(config, len(layers))
        self._model_config, self._text_config, self._should_compile = config, text_config, should_compile
        self._decide()

    def _decide(self) -> None:
        """Find out what is known of attention before the next pass."""
        implementation = self._text_config._attn_implementation
        interface.install(implementation)
        self._pass.decide(interface.why_decoded(implementation))

    @property
    def _is_user_defined(self) -> bool:
        """Set by `generate`, before anything else, on a cache that it was given."""
        return self._pass.is_generating

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._pass.is_generating, self._pass.generation = value, self._pass.generation + 1
        self._decide()

    @property
    def generation(self) -> int:
        """The number of the call of `generate` that passes come from; 0 if they come from none."""
        return self._pass.generation if self._pass.is_generating else 0

    def _why_never(self, should_compile: bool, layers: list[Any], storage: Storage) -> str | None:
        """Why `generate` never compiles decode steps with this cache, whatever the model does, if so."""
        if storage.layers.offload is not None:
            return "offload=True: pages come from host memory step by step, which a captured graph cannot do"
        kept = [layer for i, layer in enumerate(layers) if i in self._exact or type(layer) is not DynamicLayer]
        if stock := sorted({type(layer).__name__ for layer in kept if not layer.is_compileable}):
            return f"transformers' {', '.join(stock)} cannot be compiled"
        return None if should_compile else "compile=False, the default where no kernels serve or several processes share work"

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take the new keys and values of a layer.

        After PQC001, PQC004 or any other error raised here the cache is at the positions before the step, and usable. After
        an error elsewhere in the forward pass `get_seq_length` says these positions, too, and the next pass (or `crop`)
        takes back what some layers have stored. Tokens that return from a page to the window are restored as in `crop`.
        """
        layer = self.layers[layer_idx]
        if not (isinstance(layer, PagedLayer) and layer.is_traced(key_states)):  # else it has been here before, eagerly
            self._prepare(layer_idx, key_states, value_states)
            if layer_idx in self._pass.without_positions:
                self._pass.note_entry(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _prepare(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Fit a layer to its first tokens. Raises ValueError where it cannot."""
        self._attention.check(layer_idx, self._is_user_defined)
        layer = self.layers[layer_idx]
        if not isinstance(layer, PagedLayer) or layer_idx in self.storage.layers.views:
            return
        self.storage.check_in_step()  # layers of sequences need not be
        if not self._pass.is_in_step(keys.shape[2]):
            self._pass.without_positions.add(layer_idx)
            self._keep_exact(layer_idx, NO_POSITIONS)
        elif (reason := self._why_unfit(keys, values)) is not None:
            self._keep_exact(layer_idx, reason)

    def _keep_exact(self, index: int, reason: str) -> None:
        """Let transformers keep a layer that has no tokens yet."""
        self.layers[index] = self.layers[index].stock()
        self._compressed.remove(index)
        self._exact[index] = reason
        self._pass.decoded.pop(index, None)
        self._pass.rule_out(f"layer {index} is transformers' {type(self.layers[index]).__name__}")

    def _why_unfit(self, keys: Tensor, values: Tensor) -> str | None:
        """Why pages cannot hold tokens like these, if so."""
        return None

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer keeps nothing but a state. Until 5.23 transformers knows only its own layer that keeps both."""
        return [isinstance(x, LinearAttentionCacheLayerMixin) and not isinstance(x, CacheLayerMixin) for x in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions that the cache has seen, in all its layers: left padding counts, and what `pressed` has pruned."""
        if torch.compiler.is_compiling():
            return super().get_seq_length(layer_idx) if self.is_compileable else self._length_on_host(layer_idx)
        if layer_idx or not self.storage.layers.views:
            return super().get_seq_length(layer_idx)
        return self._pass.complete() - self.layers[min(self.storage.layers.views)].untold

    @torch.compiler.disable
    def _length_on_host(self, layer_idx: int) -> Any:
        return self.get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the next token. After compiled steps a device tensor, as StaticCache's: to read it would be a wait."""
        views = self.storage.layers.views
        if not self.storage.lengths.is_stale or torch.compiler.is_compiling() or not views:
            return super().get_query_offset(layer_idx)
        return self.storage.layers.device_position(layer_idx if layer_idx in views else min(views))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the sequences: page tables move, pages are shared by count, only exact windows are copied."""
        self._select(beam_idx.tolist())
        for layer in self._stock_parts().values():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; the copies share their pages."""
        parts = self._stock_parts(able_to="batch_repeat_interleave")
        self._select([seq for seq in range(self.storage.layers.batch) for _ in range(repeats)])
        for layer in parts.values():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences at `indices`: numbers, a mask or a slice, as a tensor is indexed by."""
        parts = self._stock_parts(able_to="batch_select_indices")
        if self.storage.layers.views:
            index = indices.cpu() if isinstance(indices, Tensor) else list(indices) if isinstance(indices, tuple) else indices
            self._select(torch.arange(self.storage.layers.batch)[index].tolist())
        for layer in parts.values():
            layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove positions.

        Tokens that fall back into the exact window come back exactly where the window still has them, else as their
        pages have them. Raises ValueError for a positive number, whose meaning transformers has changed.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, how many tokens to remove")
        self.storage.check_in_step()
        self._pass.settle()
        if tokens_to_remove or not self.storage.lengths.is_stale:  # crop(0), of a deferred stop check, must not wait
            with out_of_memory_as_pqc004("restoring the exact windows"):
                if self.storage.lengths.is_uneven:
                    self._pass.roll_back()
                if tokens_to_remove:
                    self._pass.entries.clear()
                if tokens_to_remove and self.storage.layers.views:
                    self.storage.crop(self._end_after(-tokens_to_remove))
        for layer in self._stock_parts().values():
            layer.crop(tokens_to_remove)

    def _end_after(self, count: int) -> int:
        """The position that the cache ends at without the last `count`. Raises ValueError inside of a pruned prompt."""
        lengths, end = self.storage.lengths, self._pass.complete() - count
        if end > 0 and end < lengths.pruned_until and lengths.counts_removed:
            raise ValueError(
                f"crop to {end} tokens: of the first {lengths.pruned_until} each head kept others, so none of them can be told "
                "to be the last; reset() the cache and pass the input again"
            )
        is_any_left = lengths.counts_removed or any(end > lengths.removed.get(i, 0) for i in self.storage.layers.views)
        return max(0, end) if is_any_left else 0

    def reset(self) -> None:
        """Forget all tokens; memory and addresses stay."""
        self._pass.reset()
        self.storage.reset()
        self._sequences.forget()
        for i in self._compressed:
            self.layers[i].is_initialized = False
        for layer in self._stock_parts().values():
            if isinstance(layer, DynamicLayer):  # transformers 5.17 would zero its tokens and keep their number
                layer.keys = layer.values = None
                layer.is_initialized = False
            layer.reset()

    def _select(self, indices: Sequence[int]) -> None:
        self.storage.check_in_step()
        self._pass.settle()
        if not self.storage.layers.views:
            return
        with out_of_memory_as_pqc004("the windows of other sequences"):
            self.storage.select(indices)
        for i in self._compressed:
            self.layers[i].batch_size = len(indices)

    def _stock_layers(self) -> dict[int, Any]:
        """The layers that transformers itself keeps, by index; there may be more than the config tells of."""
        return {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, PagedLayer)}

    def _stock_parts(self, *, able_to: str | None = None) -> dict[int, Any]:
        """These, and the states of layers of which we keep the tokens only.

        Raises NotImplementedError where one has no method of the name `able_to`.
        """
        parts = {i: getattr(layer, "states", layer) for i, layer in enumerate(self.layers) if type(layer) is not PagedLayer}
        for i, part in parts.items():
            if able_to is not None and not hasattr(part, able_to):
                raise NotImplementedError(f"layer {i} is transformers' {type(part).__name__}, which has no {able_to}")
        return parts

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        self._pass.settle()
        with out_of_memory_as_pqc004("a copy of the cache"):
            storage = self.storage.clone()
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update(vars(self))
        stock: list[Any] = DynamicCache(config=self._model_config).layers
        PagedCache.__init__(new, self._model_config, stock, list(self._compressed), storage, self._should_compile)
        new._exact = dict(self._exact)
        new._pass.follow(self._pass)
        new._sequences.places = dict(self._sequences.places)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, PagedLayer):
                new.layers[i : i + 1] = [copy.deepcopy(layer, memo)]
                continue
            if layer.is_initialized:
                new.layers[i].adopt(layer)
            if isinstance(layer, HybridLayer):
                new.layers[i].states = copy.deepcopy(layer.states, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it is memory of one process, made for one model. Use copy.deepcopy "
            "for a copy; export_sequence() makes bytes of a sequence, codebook.save_pretrained() files of a codebook"
        )

    def stats(self) -> dict[str, Any]:
        """Tokens, pages, true bytes by kind, the bytes an fp16 cache takes, which backend attends and why, and how often.

        `removed` is how many tokens of the prompt `press` has pruned, by layer; `bytes_fp16` is of those that are left.
        `bytes` is what tokens use, by kind, and `bytes_total` their sum; `bytes_reserved` is what the cache holds of the
        device's and the host's memory for it, as the allocator counts: pages come in slabs, so it is more by up to a slab
        and an eighth. `calls` counts launches from the host; replays of a captured CUDA graph do not pass there.
        `true_bits` is what pages hold of a number of keys and values: codes, scales, offsets and padding, without the window.
        `eager_because` says why decode steps are not compiled, None where they may be. With offload=True the pages, `codes`
        or `pages`, lie on the host, and `staging` is what the device holds of them; without, `bytes_host` is 0. Deep copies
        share pages, and each tells those that it has.
        """
        self._pass.settle()
        exact = dict.fromkeys(self._stock_layers(), COPY) | self._exact
        return stats.stats(self._pass, self.layers, self._compressed, exact)

    # -- sequences one by one. Each raises before it changes anything; an unknown id is a KeyError ---------------------
    @property
    def sequence_ids(self) -> list[Hashable]:
        """The sequences there are, oldest first."""
        return list(self._sequences.places)

    def allocate_sequence(self, seq_id: Hashable, initial_len: int = 0) -> None:
        """Begin an empty sequence and own the pages of its first `initial_len` tokens.

        Raises ValueError if there is such a sequence already, or the cache holds tokens of `generate`; PagesExhaustedError
        (PQC001) and CacheOutOfMemoryError (PQC004), as all that follow.
        """
        self._sequences.allocate(seq_id, initial_len)

    def append_tokens(self, seq_id: Hashable, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Store the newest tokens of a sequence in one layer.

        Args:
            k, v: (H, T, d) or (1, H, T, d), keys after their rotary embedding, in the model's dtype.

        Raises:
            ValueError: a shape, dtype or device differs from the layer's, or the layer is not kept in pages.
        """
        self._sequences.append(seq_id, layer_idx, k, v)

    def get_kv(self, seq_id: Hashable, layer_idx: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a sequence in one layer, decoded where they are codes: (H, n, d) each.

        Raises ValueError if no sequence has had a token in this layer yet.
        """
        return self._sequences.get_kv(seq_id, layer_idx)

    def fork_sequence(self, src: Hashable, dst: Hashable) -> None:
        """Begin sequence `dst` as a copy of `src`. They share whole pages by count; only `src`'s window is copied."""
        self._sequences.fork(src, dst)

    def crop_sequence(self, seq_id: Hashable, length: int) -> None:
        """Keep a sequence's first `length` tokens in every layer. Tokens that return to the window come from pages."""
        self._sequences.crop(seq_id, length)

    def free_sequence(self, seq_id: Hashable) -> None:
        """Forget a sequence. Pages that no other one shares are free at once."""
        self._sequences.free(seq_id)

    def sequence_stats(self, seq_id: Hashable) -> dict[str, Any]:
        """Tokens (the most that a layer holds), pages, how many of these are shared with others, and bytes of the pages."""
        return self._sequences.stats(seq_id)
