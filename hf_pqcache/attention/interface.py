"""Reaches the fused attention under an unchanged `generate`; knows handles, not caches.

Transformers looks an attention function up by name at every call. Its entry is wrapped in place, under its own name:
the mask that belongs to the implementation stays, the model's config is untouched, and every other cache goes through
to the original function. So does ours wherever the fused attention cannot be sure to compute what the original would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_pqcache.attention.functions import Known, eager_function, known, name_of, wants_weights
from hf_pqcache.attention.lazy_kv import DECODED, KVHandle, LazyKV

#: Keywords that do not change what attention computes, or that the fused path honours. Anything else that is set
#: sends the call to the original function with decoded keys; `softcap` and `s_aux` depend on the function.
_HARMLESS = frozenset(
    {
        "scaling",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
        "position_embeddings",
        "input_ids",
        "labels",
    }
)


def _foreign(function: Any) -> str:
    return f"the attention function {name_of(function)} is not transformers' own"


def _odd_keyword(facts: Known, kwargs: dict[str, Any]) -> str | None:
    """A keyword of the call that the fused attention does not honour as a function with these facts does, if any."""
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name in ("dropout", "output_attentions", "sliding_window") and not value:
            continue
        if name == "is_causal" and value is True:
            continue
        if (name == "softcap" and facts.caps) or (name == "s_aux" and facts.sinks):
            continue
        return name
    return None


def _hides(mask: Any, facts: Known) -> bool:
    """Whether a mask hides from a function with these facts what it seems to: eager attention adds a bool one to scores."""
    if not isinstance(mask, Tensor) or (mask.dim() == 2) != facts.has_flat_mask:
        return False
    is_usual = mask.is_floating_point() or (facts.has_bool_mask and mask.dtype == torch.bool)
    return mask.dim() == 2 or (mask.dim() == 4 and is_usual)


def _fits(mask: Any, facts: Known) -> bool:
    """Whether the fused attention reads a mask as a function with these facts does."""
    return mask is None or (_hides(mask, facts) and (mask.dim() == 2 or mask.shape[1] == 1))


def _needs_gradient(query: Tensor, key: LazyKV, value: LazyKV) -> bool:
    """Whether a step is to be differentiated, which the ops cannot be."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (query, key.fresh, value.fresh))


def _as_column_mask(mask: Tensor | None) -> Tensor | None:
    """A mask of one query token as (B or 1, 1, 1, n); flash attention's (B, n) of ones and zeros becomes bool."""
    if mask is not None and mask.dim() == 2:
        return mask[:, None, None, :].bool()
    return mask


def _layers_of(*sides: Any) -> list[Any]:
    """The layers whose handles are among keys and values."""
    return list({id(x.layer): x.layer for x in sides if isinstance(x, LazyKV)}.values())


class Dispatcher:
    """An attention function that reads codes when it is given handles and is the original for everything else."""

    def __init__(self, original: Callable[..., Any] | None) -> None:
        """original: None for the eager function of each module's own file, which is no entry of the interface."""
        self._original = original
        self._known = None if original is None else known(original)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(key, KVHandle) or isinstance(value, KVHandle):
            return self._traced(module, query, key, value, attention_mask, *args, **kwargs)
        if isinstance(key, LazyKV) or isinstance(value, LazyKV):
            run = self._eager_in_graph if torch.compiler.is_compiling() else self._eager
            return run(module, query, key, value, attention_mask, *args, **kwargs)
        return self._call(module, query, key, value, attention_mask, *args, **kwargs)

    @property
    def why_decoded(self) -> str | None:
        """Why no call of it can be fused, if so."""
        return None if self._original is None or self._known is not None else _foreign(self._original)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (self._original or eager_function(module))(module, *args, **kwargs)

    def _why_decoded(self, key: Any, module: nn.Module, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the fused attention cannot stand in for the original in this call, however many queries it has."""
        facts = key.layer.eager_facts if self._original is None else self._known
        if facts is None:
            return _foreign(self._original or eager_function(module))
        if args:
            return "attention is given positional arguments that are not known"
        if (name := _odd_keyword(facts, kwargs)) is not None:
            return f"the fused attention does not know what the attention function makes of the keyword {name}"
        if not _fits(mask, facts):
            return "the fused attention cannot read the mask as the attention function does"
        if not getattr(module, "is_causal", True):
            return "the model's attention is not causal"
        return None

    def _fused(self, query: Tensor, key: Any, value: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        softcap = kwargs.get("softcap") or 0.0
        out = key.layer.attend(
            query, _as_column_mask(mask), kwargs.get("s_aux"), float(scale), float(softcap), value.fresh.shape[-1]
        )
        return out, None

    def _traced(self, module: nn.Module, query: Tensor, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        both = isinstance(key, KVHandle) and isinstance(value, KVHandle)
        if both and query.shape[2] == 1 and self._why_decoded(key, module, mask, args, kwargs) is None:
            return self._fused(query, key, value, mask, kwargs)
        key, value = (x.dense() if isinstance(x, KVHandle) else x for x in (key, value))
        return self._call(module, query, key, value, mask, *args, **kwargs)

    def _eager(self, module: nn.Module, query: Tensor, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        layers = _layers_of(key, value)
        try:
            for layer in layers:
                mask = layer.fitted(mask, query.shape[2])
            reason = self._look(module, key, value, mask, args, kwargs)
            told = self._told(key, mask)
            for layer in layers:
                layer.check_mask(told)
            if reason is None and _needs_gradient(query, key, value):
                reason = "gradients are asked for, which the fused attention has none of"
            for layer in layers:
                layer.note_decoded(reason)
            # One query over several new keys: Gemma 4 asks its last layers for the last token of a prompt only. New keys
            # that come together are seen exactly, so this is not a decode step.
            if reason is None and query.shape[2] == key.fresh.shape[2] == 1:
                key.layer.commit(told, kwargs.get("position_ids"))  # a first prompt of a single token waits, too
                return self._fused(query, key, value, mask, kwargs)
            key, value = (x.dense() if isinstance(x, LazyKV) else x for x in (key, value))
            wide = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > key.shape[-2]
            narrow = mask[..., : key.shape[-2]] if wide else mask
            out = self._call(module, query, key, value, narrow, *args, **kwargs)
        except BaseException:
            for layer in layers:
                layer.abort_pass()
            raise
        for layer in layers:
            layer.note_seen(module, told, kwargs.get("position_ids"))
        return out

    def _told(self, key: Any, mask: Any) -> Any:
        """The mask as far as it tells what is hidden; None where it hides nothing."""
        facts = getattr(getattr(key, "layer", None), "eager_facts", None) if self._original is None else self._known
        return None if facts is not None and isinstance(mask, Tensor) and not _hides(mask, facts) else mask

    @torch.compiler.disable  # the wrapper costs some microseconds, so only where it is needed
    def _eager_in_graph(self, module: nn.Module, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        out = self._eager(module, query, key, value, *args, **kwargs)
        for layer in _layers_of(key, value):
            layer.commit()  # what comes next may be a graph, which cannot
        return out

    def _look(
        self, module: nn.Module, key: Any, value: Any, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Look at the original again, it may have changed, and say why this call's keys must be decoded, if so."""
        facts = known(self._original or eager_function(module))
        if self._original is not None:
            self._known = facts
        elif isinstance(key, LazyKV):
            key.layer.eager_facts = facts
        if not (isinstance(key, LazyKV) and isinstance(value, LazyKV)) or key.is_touched or value.is_touched:
            return DECODED
        if facts is not None and facts.has_weights and wants_weights(module):
            return "somebody asks for attention weights"
        if facts is not None and facts.sinks == "module" and kwargs.get("s_aux") is not getattr(module, "sinks", None):
            return "attention takes its sinks from the module, which the call does not pass on"
        return self._why_decoded(key, module, mask, args, kwargs)


def install(implementation: str | None) -> None:
    """Wrap the attention function of that name, or all of them; idempotent.

    Called by a cache's constructor and again in every eager forward, since an entry may be registered later or replaced.
    """
    local = getattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})  # wins over what is registered for all
    for name in [implementation] if implementation else [*ALL_ATTENTION_FUNCTIONS.keys(), "eager"]:
        current = ALL_ATTENTION_FUNCTIONS.get(name)
        if isinstance(current, Dispatcher) or (current is None and name != "eager"):
            continue
        if name in local:
            local[name] = Dispatcher(current)
        else:  # for all to see, and for a later `register` to replace
            AttentionInterface.register(name, Dispatcher(current))


def why_decoded(implementation: str | None) -> str | None:
    """Why keys and values are decoded for the attention function of that name, as far as it tells without a model."""
    entry = ALL_ATTENTION_FUNCTIONS.get(implementation) if implementation else None
    return entry.why_decoded if isinstance(entry, Dispatcher) else None
