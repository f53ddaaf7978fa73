"""One layer of a paged cache: handles for attention, tokens for the storage; knows transformers, not its cache."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

import hf_pqcache.attention.ops  # noqa: F401 - registers the ops
from hf_pqcache.attention import interface, padding
from hf_pqcache.attention.lazy_kv import KEY, VALUE, KVHandle, LazyKV
from hf_pqcache.backends import dispatch
from hf_pqcache.cache.forward_pass import ForwardPass
from hf_pqcache.cache.pending import Pending
from hf_pqcache.cache.tensors import LayerTensors
from hf_pqcache.config import Side
from hf_pqcache.models.shapes import layer_configs
from hf_pqcache.storage.memory import out_of_memory_as_pqc004


class PagedLayer(LayerTensors, CacheLayerMixin):
    """One compressed layer: hands handles to attention, tokens to the storage that all layers of the cache share."""

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, forward_pass: ForwardPass, config: PreTrainedConfig) -> None:
        """config: of the decoder; which attention function the model uses is asked of it in every pass."""
        self.storage = forward_pass.storage
        self.index = index
        self._pass = forward_pass
        self._config = config
        self._before = 0  # tokens before the pass under way
        self._pending: Pending | None = None
        self._is_traceable = False
        self.eager_facts: Any = None
        super().__init__()

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self._pass.eager_because is None

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLayer:
        """What a layer is without its cache: transformers' own, with what this one holds.

        The cache copies its layers itself. A model that runs a layer several times copies it for its other turns.
        """
        layer = memo[id(self)] = self.stock()
        if self.is_initialized and self.get_seq_length():
            self.commit()
            layer.update(self._decoded(KEY), self._decoded(VALUE))
        self._pass.rule_out("the model has copied a layer for itself")
        return layer

    def stock(self) -> DynamicLayer:
        """transformers' own layer in place of this one, without tokens."""
        return DynamicLayer()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.storage.set_batch(key_states.shape[0])
        self.open(key_states, value_states)

    @torch.compiler.disable
    def open(self, keys: Tensor, values: Tensor) -> None:
        """Make room for tokens like keys, values (..., H, T, d) in all sequences of the storage."""
        if self.index not in self.storage.layers.views:  # after a reset there is room
            self.storage.open(self.index, keys, values)
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size = self.storage.layers.batch
        # Plain torch reads lengths on the host, and pages in host memory are moved by the host, which a CUDA graph cannot:
        # there a compiled model breaks its graph here.
        view = self.storage.layers.views[self.index]
        heads = getattr(layer_configs(self._config)[0], "num_attention_heads", None) or keys.shape[-3]
        has_kernels = view.kernels is not None and dispatch.serves(view, max(1, heads // keys.shape[-3]))
        self._is_traceable = (keys.device.type == "cpu" or has_kernels) and self.storage.layers.offload is None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take new keys and values (B, H, T, d); returns handles that attention reads codes through.

        Several tokens at once attend in full precision: they wait until attention has seen them, then are stored.
        """
        if self.is_traced(key_states):
            return self._update_traced(key_states, value_states)
        if torch.compiler.is_compiling() and self.index in self._pass.decoded:
            return self._update_dense(key_states, value_states)
        return self._update_eager(key_states, value_states)

    def is_traced(self, keys: Tensor) -> bool:
        """Whether new keys (B, H, T, d) come in a decode step that is being compiled as a whole."""
        is_step = torch.compiler.is_compiling() and keys.shape[2] == 1
        return is_step and self.is_compileable and self._is_traceable and keys.dtype == self.dtype

    def _update_traced(self, keys: Tensor, values: Tensor) -> tuple[Any, Any]:
        state = self.storage.layers.state(self.index)
        torch.ops.hf_pqcache.append(keys, values, state.seq_lens, state.layer_ptrs, self.index)
        self.storage.lengths.is_stale = True
        if self.index in self._pass.decoded:  # the model does with keys what no handle can answer
            return self.dense_traced(KEY, keys), self.dense_traced(VALUE, values)
        return KVHandle(self, KEY, keys), KVHandle(self, VALUE, values)

    @torch.compiler.disable
    def _update_dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `_update_eager`, for code that is being compiled around it: tensors, and nothing waits for attention.

        Attention's mask is not seen here, so left padding is stored like any token; the mask hides it.
        """
        reason = self._pass.decoded[self.index]
        sides = tuple(side.dense() for side in self._update_eager(keys, values))
        self.commit()
        self.note_decoded(reason)
        if self.is_compileable and keys.shape[2] == 1:  # the mask of such steps is that wide
            missing = self.get_max_length() - sides[0].shape[2]
            sides = tuple(torch.nn.functional.pad(side, (0, 0, 0, missing)) for side in sides)
        return sides[0], sides[1]

    @torch.compiler.disable
    def _update_eager(self, keys: Tensor, values: Tensor) -> tuple[LazyKV, LazyKV]:
        interface.install(self._config._attn_implementation)
        self._pass.begin(self.index, keys.shape[2])
        self._pass.decoded.pop(self.index, None)
        storage, count = self.storage, keys.shape[2]
        try:
            with out_of_memory_as_pqc004("the new tokens"):
                storage.set_batch(keys.shape[0])
                if not self.is_initialized:
                    self.open(keys, values)
                self.batch_size = storage.layers.batch
                self._before = storage.lengths.tokens(self.index)
                total, columns = self._before + count, storage.lengths.columns(self.index) + count
                keys, values = storage.fit_dtypes(self.index, keys, values)
                self.dtype = keys.dtype
                if count == 1 and total > 1:
                    storage.reservation.reserve_positions(self.index, total)
                    state = storage.layers.state(self.index)
                    with torch.no_grad():
                        torch.ops.hf_pqcache.append(keys, values, state.seq_lens, state.layer_ptrs, self.index)
                    storage.advance(self.index, 1)
                else:  # attention sees them as they are, gradients included, before they are stored
                    self._pending = Pending(keys, values, count, self._before)
                    self._pass.pending.append(self)
                return LazyKV(self, KEY, keys, columns), LazyKV(self, VALUE, values, columns)
        except BaseException:
            self._pass.abort(self.index)
            raise

    def check_mask(self, mask: Any) -> None:
        """Called with what attention is given in a pass. Raises ValueError if it shows left padding that was not stored."""
        left_pad = self.storage.lengths.left_pad
        if any(left_pad) and self.index == min(self.storage.layers.views):  # all layers get the same, or less
            padding.refuse_shown(mask, left_pad)

    def note_decoded(self, reason: str | None) -> None:
        """Called when attention is reached, or somebody else reads keys: why they are decoded, None if they need not be."""
        if reason is not None:
            self._pass.decoded.setdefault(self.index, reason)

    def abort_pass(self) -> None:
        """After an error in attention: return to the positions before the pass."""
        self._pass.abort(self.index, self._before)

    def fitted(self, mask: Any, queries: int) -> Any:
        """`mask` with the layer's columns, where layers have different numbers of them."""
        if not self.storage.lengths.removed or (queries == 1 and self.is_compileable):  # that one hides nothing
            return mask
        columns = self.storage.lengths.columns(self.index) + self.num_pending
        if mask is None and 1 < queries < columns and self._config._attn_implementation == "sdpa":
            mask = padding.causal(queries, self.device)  # none was needed for the layer that it was made for: it held nothing
        return padding.fitted(mask, columns)

    def note_seen(self, module: nn.Module, mask: Any, positions: Tensor | None) -> None:
        """Called when attention has seen the tokens that wait. They wait on if `module` has hooks, which may change them."""
        pending = self._pending
        if pending is not None and module._forward_hooks:
            pending.seen_by, pending.mask, pending.position_ids = module, mask, positions
        else:
            self.commit(mask, positions)

    def commit(self, mask: Any = None, positions: Tensor | None = None) -> None:
        """Store the tokens that attention has now seen. `mask`, `positions`: what it was given; they tell left padding."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._pass.pending.remove(self)
        if pending.seen_by is not None:
            mask, positions = pending.mask, pending.position_ids
        storage, first, keys = self.storage, self.storage.lengths.tokens(self.index), pending.keys
        try:
            pending.settle()
            with torch.no_grad(), out_of_memory_as_pqc004("encoding the new tokens"):
                if not pending.positions:
                    return
                if pending.removed:
                    storage.append_pruned(self.index, keys, pending.values, pending.positions, pending.counts_removed)
                    return
                if storage.lengths.wants_padding(first):
                    batch, is_generating = keys.shape[0], self._pass.is_generating
                    hidden = padding.leading_padding(mask, positions, first, keys.shape[2], batch, is_generating)
                    storage.lengths.note_padding(self.index, hidden)
                storage.append(self.index, keys, pending.values)
        except BaseException:
            self._pass.abort(self.index)
            raise

    def offload(self) -> None:
        raise NotImplementedError(
            "a layer in pages does not move to the host by itself: layers share their pages. Build the cache with "
            "offload=True, which keeps the pages of all layers there"
        )

    prefetch = offload

    def _refuse_alone(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "a layer in pages does not change alone: the layers of a cache share page tables. Call reset, crop, "
            "reorder_cache, batch_repeat_interleave or batch_select_indices on the cache"
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse_alone

    def discard_pending(self) -> None:
        self._pending = None

    @property
    def num_pending(self) -> int:
        """Positions that wait for attention to have seen them."""
        return 0 if self._pending is None else self._pending.positions

    @property
    def seen_by(self) -> nn.Module | None:
        """The attention module whose hooks may change the tokens that wait; None if none do."""
        return None if self._pending is None else self._pending.seen_by

    def has_prompt_for(self, module: nn.Module) -> bool:
        """Whether a prompt waits that hooks of `module` may replace."""
        return self._pending is not None and self._pending.seen_by is module and not self._pending.before

    @property
    def untold(self) -> int:
        """Positions that transformers is not told of, see `Lengths.counts_removed`."""
        waiting = 0 if self._pending is None or self._pending.counts_removed else self._pending.removed
        return self.storage.lengths.untold(self.index) + waiting

    def adopt(self, other: PagedLayer) -> None:
        """Be as far as `other`, a layer whose tokens this one's storage has copied."""
        self.dtype, self.device, self.batch_size = other.dtype, other.device, other.batch_size
        self._is_traceable, self.is_initialized = other._is_traceable, True

    # -- what handles ask ----------------------------------------------------------------------------------------
    def dense(self, which: Side, new: Tensor) -> Tensor:
        """All keys or values, (B, H, n, d): decoded past, then pending new tokens exactly."""
        if self._pending is None:
            whole = self._decoded(which)
            if torch.is_grad_enabled() and new.requires_grad:  # the newest token is exact; what it came from gets its gradient
                whole = torch.cat([whole[:, :, : -new.shape[2]], new], dim=2)
            return whole
        return new if self.storage.lengths.tokens(self.index) == 0 else torch.cat([self._decoded(which), new], dim=2)

    def dense_traced(self, which: Side, new: Tensor) -> Tensor:
        state = self.storage.layers.state(self.index)
        total = self.get_max_length()
        return torch.ops.hf_pqcache.dense(new, state.seq_lens, state.layer_ptrs, self.index, which, total)

    def attend(
        self, query: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, value_dim: int
    ) -> Tensor:
        """Attention of one query token (B, Hq, 1, d) over the layer -> (B, 1, Hq, dv)."""
        state = self.storage.layers.state(self.index)
        return torch.ops.hf_pqcache.attend(
            query, state.seq_lens, state.layer_ptrs, mask, sinks, self.index, scale, softcap, value_dim
        )

    # -- what transformers asks ----------------------------------------------------------------------------------
    def get_seq_length(self) -> Any:
        if not self.is_initialized:
            return 0
        if torch.compiler.is_compiling():
            return self.storage.layers.device_position(self.index) if self.is_compileable else self._length_on_host()
        return self.storage.lengths.tokens(self.index) + self.num_pending - self.untold

    @torch.compiler.disable
    def _length_on_host(self) -> Any:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, positions before its first column). For one-token steps of a compileable cache the length is constant: a
        changing mask would be a new graph each.

        Asked before every step: an exhausted pool (PQC001) is found here, before any layer has changed.
        """
        is_fixed, skipped = self.is_compileable and query_length == 1, self._skipped
        if torch.compiler.is_compiling():
            if not self.is_compileable:
                return self._mask_sizes_on_host(query_length)
            return (self.get_max_length() if is_fixed else self.get_seq_length() - skipped + query_length), skipped
        self._pass.settle_seen()
        skipped = self._skipped
        interface.install(self._config._attn_implementation)  # a compiled step does not come past `update` any more
        if is_fixed:  # nothing here may read the device: a step is about to start
            if self.is_initialized:
                self.storage.before_step(self.index)
            return self.get_max_length(), skipped
        total = self._pass.complete() + query_length
        if self.is_initialized and total > query_length:
            self.storage.reservation.reserve_positions(self.storage.longest(self.index), total)
        return total - self.storage.lengths.removed.get(self.index, 0), skipped

    @property
    def _skipped(self) -> int:
        """Positions that transformers counts and the layer has no token of, as a sliding window has none of the oldest."""
        lengths = self.storage.lengths
        return lengths.removed.get(self.index, 0) if lengths.counts_removed else 0

    @torch.compiler.disable
    def _mask_sizes_on_host(self, query_length: int) -> tuple[int, int]:
        return self.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.storage.layers.max_tokens if self.is_compileable else -1
