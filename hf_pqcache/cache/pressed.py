"""Lets a press compress prompts on their way into a paged cache, by forward hooks of the model; knows no particular press."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_pqcache.cache.base import PagedCache
from hf_pqcache.cache.layer import PagedLayer
from hf_pqcache.compressors.model import lend_rotary, prepared
from hf_pqcache.compressors.press import Press
from hf_pqcache.models import images
from hf_pqcache.models.names import NAMES

#: Models within `pressed`.
_UNDER_WAY: weakref.WeakSet[Any] = weakref.WeakSet()


@contextmanager
def pressed(model: Any, press: Press | str) -> Iterator[None]:
    """Within it, what comes first into an empty PagedPQCache or PagedKVCache is compressed by `press`, then stored.

    Each layer keeps as many tokens in all heads and rows, layers may keep different numbers; each head keeps its own. The
    positions of later tokens go on behind the whole prompt, and `get_seq_length` tells them; a turn that follows is stored
    as it is. Decode steps may be compiled; once for inside and once for outside, so let it hold all turns. Other caches are
    left alone.

    Args:
        press: "snapkv:0.5", see `parse`, or an object with `compress`, see `Press`; any kvpress press that has no more.

    Raises:
        ValueError: an unknown press, one that does more than compress a prompt, an encoder-decoder model, another press at
            work. In the forward pass: a padded batch, a prompt that `generate` passes in pieces (prefill_chunk_size), or keys
            and values that are not one number of tokens for all heads; the cache is empty then, and usable.
        RuntimeError: a compiled model; a layer whose attention does not go through transformers' attention interface.
    """
    chosen = prepared(press, model)
    if model in _UNDER_WAY:
        raise ValueError(f"the model's prompts are pressed already: leave one `pressed` before {press!r} begins")
    pressing = _Pressing(chosen, model)
    _UNDER_WAY.add(model)
    try:
        yield
    finally:
        _UNDER_WAY.discard(model)
        pressing.end()


class _Pressing:
    """The hooks of one `pressed` block."""

    def __init__(self, press: Press, model: Any) -> None:
        self._press = press
        self._reached: weakref.WeakKeyDictionary[PagedCache, set[int]] = weakref.WeakKeyDictionary()
        self._told: dict[str, Any] = {}
        self._ends: weakref.WeakKeyDictionary[PagedCache, tuple[int, int]] = weakref.WeakKeyDictionary()
        modules = [part for part in model.modules() if isinstance(getattr(part, "layer_idx", None), int)]
        self._handles = [part.register_forward_hook(self._hook(self._compress), with_kwargs=True) for part in modules]
        self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._hook(self._check_reached), with_kwargs=True))
        self._take_back = lend_rotary(model, modules)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._take_back()

    @staticmethod
    def _hook(act: Any) -> Any:
        """`act` for what may be a prompt; a decode step passes by, compiled or not."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            inputs = kwargs.get("hidden_states", kwargs.get("input_ids", args[0] if args else None))
            if inputs is None or inputs.shape[1] > 1:
                act(module, args, kwargs, output)

        hook.reads_no_weights = True  # type: ignore[attr-defined]
        return hook

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if ids is None else ids
        if inputs is None or inputs.shape[1] > 1:
            self._see_input(module, ids, inputs, kwargs)

    @torch.compiler.disable
    def _see_input(self, model: Any, ids: Tensor | None, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Before the model: is it a prompt's next piece, and which tokens are of images?"""
        self._told = images.told(model.config, ids)
        cache, wanted = _cache_of(kwargs), kwargs.get("logits_to_keep")
        if not isinstance(cache, PagedCache) or inputs is None or not isinstance(wanted, int):
            return
        # Behind a prompt `generate` passes one token, or guesses, of which it wants all logits.
        if self._ends.get(cache) == (cache.generation, cache.get_seq_length()) and wanted not in (0, inputs.shape[1]):
            cache.reset()
            raise ValueError(
                "generate passes the prompt in pieces, and a press needs it whole: leave prefill_chunk_size out. The cache has "
                "been reset"
            )

    @torch.compiler.disable
    def _compress(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After an attention module, or a decoder layer around one, which has nothing to do with it."""
        cache = _cache_of(kwargs)
        layer = cache.layers[module.layer_idx] if isinstance(cache, PagedCache) else None
        if not isinstance(layer, PagedLayer) or not layer.has_prompt_for(module):
            return
        try:
            layer.replace(*self._compressed(module, args, kwargs, output, layer), repr(self._press))
        except BaseException:
            layer.abort_pass()
            raise
        self._reached.setdefault(cache, set()).add(layer.index)

    def _compressed(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any, layer: Any) -> tuple[Tensor, Tensor]:
        for name in ("alibi", "position_bias"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(module).__name__} counts distances in the cache ({name}), which pruning would change")
        told = {name: value for name, value in kwargs.items() if name not in NAMES} | self._told
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attentions = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        with torch.no_grad():
            found = self._press.compress(module, hidden, layer.keys, layer.values, attentions, told)
        if getattr(module, "masked_key_indices", None) is not None:
            raise ValueError(
                f"{type(self._press).__name__} lets heads keep different numbers of tokens; pages hold as many of all"
            )
        return found

    @torch.compiler.disable
    def _check_reached(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the model: has each layer in pages that got a prompt been compressed?"""
        cache = _cache_of(kwargs) or _cache_of(output)
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if not isinstance(cache, PagedCache) or inputs is None or cache.get_seq_length() != inputs.shape[1]:
            return
        if cache.generation:
            self._ends[cache] = cache.generation, inputs.shape[1]
        layers = {layer.index for layer in cache.layers if isinstance(layer, PagedLayer)}
        if missed := sorted(layers - self._reached.pop(cache, set())):
            cache.reset()
            raise RuntimeError(
                f"the press was not shown the prompt of layers {missed}: their attention does not go through transformers' "
                "attention interface, or was compiled. The cache has been reset"
            )


def _cache_of(named: Any) -> Any:
    return next((named[name] for name in NAMES if name in named and named[name] is not None), None)
