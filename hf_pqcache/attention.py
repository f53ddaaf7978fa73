"""Reaches the fused attention under an unchanged `generate`; knows handles, not caches.

Transformers looks an attention function up by name at every call. Its entry is wrapped in place, under its own name:
the mask that belongs to the implementation stays, the model's config is untouched, and every other cache goes through
to the original function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_pqcache.handles import KEY, VALUE, KVHandle, LazyKV
from hf_pqcache.shapes import has_latent_attention

#: Keywords that do not change what attention computes, or that the fused path honours. Anything else that is set
#: sends the call to the original function with decoded keys.
_HARMLESS = frozenset(
    {
        "scaling",
        "softcap",
        "s_aux",
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
#: Keywords that the fused path honours and transformers' sdpa function ignores (5.17) or refuses (5.23).
_UNKNOWN_TO_SDPA = ("softcap", "s_aux")


def _is_fusable(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this call is plain causal attention, for one query token, that the ops can compute."""
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name in ("dropout", "output_attentions", "sliding_window") and not value:
            continue
        if name == "is_causal" and value is True:
            continue
        return False
    return getattr(module, "is_causal", True)


def _as_column_mask(mask: Tensor | None) -> Tensor | None:
    """A mask of one query token as (B or 1, 1, 1, n); flash attention's (B, n) of ones and zeros becomes bool."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, None, None, :].bool()
    return mask


class Dispatcher:
    """An attention function that reads codes when it is given handles and is the original for everything else."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

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
        if not isinstance(key, (KVHandle, LazyKV)) and not isinstance(value, (KVHandle, LazyKV)):
            return self.original(module, query, key, value, attention_mask, *args, **kwargs)
        if isinstance(key, KVHandle) and isinstance(value, KVHandle):
            return self._traced(module, query, key, value, attention_mask, *args, **kwargs)
        return self._eager(module, query, key, value, attention_mask, *args, **kwargs)

    def _can_fuse(
        self, module: nn.Module, query: Tensor, key: Any, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        # One query over several new keys: Gemma 4 asks its last layers for the last token of a prompt only. New keys
        # that come together are seen exactly, so this is not a decode step.
        if query.shape[2] != 1 or key.fresh.shape[2] != 1 or args or not _is_fusable(module, kwargs):
            return False
        if self.original is sdpa_attention_forward and any(kwargs.get(name) is not None for name in _UNKNOWN_TO_SDPA):
            return False  # whatever it does with them, decode steps shall do the same as prompts
        return mask is None or (isinstance(mask, Tensor) and (mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == 1)))

    def _fused(self, query: Tensor, key: Any, value: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        softcap = kwargs.get("softcap") or 0.0
        out = key.layer.attend(
            query, _as_column_mask(mask), kwargs.get("s_aux"), float(scale), float(softcap), value.fresh.shape[-1]
        )
        return out, None

    def _traced(
        self, module: nn.Module, query: Tensor, key: KVHandle, value: KVHandle, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._can_fuse(module, query, key, mask, args, kwargs):
            return self._fused(query, key, value, mask, kwargs)
        dense_key, dense_value = key.layer.dense_traced(KEY, key.fresh), value.layer.dense_traced(VALUE, value.fresh)
        return self.original(module, query, dense_key, dense_value, mask, *args, **kwargs)

    def _eager(self, module: nn.Module, query: Tensor, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        both = isinstance(key, LazyKV) and isinstance(value, LazyKV)
        if both and self._can_fuse(module, query, key, mask, args, kwargs):
            return self._fused(query, key, value, mask, kwargs)
        layers = {id(x.layer): x.layer for x in (key, value) if isinstance(x, LazyKV)}
        key, value = (x.dense() if isinstance(x, LazyKV) else x for x in (key, value))
        wide = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > key.shape[-2]
        narrow = mask[..., : key.shape[-2]] if wide else mask
        out = self.original(module, query, key, value, narrow, *args, **kwargs)
        for layer in layers.values():
            layer.commit(mask if isinstance(mask, Tensor) else None)
        return out


_EAGER_FUNCTIONS: dict[type, Callable[..., Any]] = {}


def module_eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention function of the file that `module` comes from.

    Every user of the attention interface names its default inside `forward`; it is a global of that file.
    """
    cls = type(module)
    if cls not in _EAGER_FUNCTIONS:
        forward = inspect.unwrap(cls.forward)
        name = next((n for n in forward.__code__.co_names if n.endswith("eager_attention_forward")), None)
        if name is None:
            raise NotImplementedError(
                f"{cls.__name__} names no eager attention function; load the model with attn_implementation='sdpa'"
            )
        _EAGER_FUNCTIONS[cls] = forward.__globals__[name]
    return _EAGER_FUNCTIONS[cls](module, *args, **kwargs)


def install(implementation: str | None) -> None:
    """Wrap the attention function of that name, or all of them; idempotent.

    Called by a cache's constructor and again at the first layer of an eager forward, since an entry may be registered
    later or replaced.
    """
    names = [implementation] if implementation else [*ALL_ATTENTION_FUNCTIONS.keys(), "eager"]
    for name in names:
        current = ALL_ATTENTION_FUNCTIONS.get(name, module_eager_attention if name == "eager" else None)
        if current is not None and not isinstance(current, Dispatcher):
            ALL_ATTENTION_FUNCTIONS[name] = Dispatcher(current)


def goes_through_interface(config: PreTrainedConfig) -> bool:
    """Whether every module of the model's file that updates a cache also looks its attention function up.

    Others (GPT-J, Falcon) read keys themselves, and latent attention (DeepSeek) expands them after `update`: such
    models run eagerly, on decoded keys.
    """
    if has_latent_attention(config):
        return False
    try:
        model_class: Any = MODEL_MAPPING[type(config)]
    except KeyError:
        return False
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    modules = [
        inspect.unwrap(c.forward).__code__.co_names
        for c in vars(sys.modules[model_class.__module__]).values()
        if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__ == model_class.__module__
    ]
    updaters = [names for names in modules if "update" in names]
    return bool(updaters) and all("get_interface" in names for names in updaters)


def leading_padding(mask: Tensor | None, first: int, count: int, batch: int) -> list[int]:
    """How many of the new tokens at columns first..first+count-1 are left padding, for each row.

    Args:
        mask: what attention was given for the new tokens: None, (B, n) of flash attention, or (B or 1, 1, T, n), bool or
            additive. Only leading columns that no later query of the row may attend to count.
    """
    if mask is None or mask.shape[-1] < first + count or (mask.dim() == 4 and mask.shape[1] != 1):
        return [0] * batch
    if mask.dtype == torch.bool or not mask.is_floating_point():
        allowed = mask.bool()
    else:
        allowed = mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed[..., first : first + count]
    last = allowed if allowed.dim() == 2 else allowed[:, 0, -1]
    last = last.expand(batch, count)
    padding = torch.where(last.any(-1), last.int().argmax(-1), count).tolist()
    if allowed.dim() == 4:
        for row, pad in enumerate(padding):
            queries = allowed[row if allowed.shape[0] > 1 else 0, 0, pad:, :pad]
            if pad < count and bool(queries.any()):
                padding[row] = 0
    return padding
