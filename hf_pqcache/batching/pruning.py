"""A press in an engine: a prompt is made shorter in the step in which it ends, before it is stored; knows no press by name.

A press wants the hidden states of the whole prompt. A hook of each attention module shows what goes into it; a prompt in
chunks keeps its own as long as its keys. A press that fails, fails one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_pqcache.batching.requests import Chunk, Pruned
from hf_pqcache.compressors.model import lend_rotary, prepared
from hf_pqcache.compressors.press import Press
from hf_pqcache.config import PQConfig
from hf_pqcache.models.images import IMAGE_TOKENS, image_token

#: What a press is shown of some tokens: hidden states (1, T, D), and the cosines and sines of their positions (1, T, d).
Shown = tuple[Tensor, tuple[Tensor, Tensor] | None]


class Pruning:
    """The hooks of a press in one engine, until `end`.

    Args:
        press: by name or itself. model: whose prompts it presses. config: of pages.
        failed: gets the error of a request that cannot be pruned.
    """

    def __init__(self, press: Press | str, model: Any, config: PQConfig) -> None:
        self.press, self.config = prepared(press, model), config
        self.failed: dict[str, Exception] = {}
        self.pruned_tokens = 0
        self._shown: dict[nn.Module, tuple[Any, dict[str, Any]]] = {}
        self._module: Any = None
        modules = [part for part in model.modules() if isinstance(getattr(part, "layer_idx", None), int)]
        self._handles = [part.register_forward_pre_hook(self._show, with_kwargs=True) for part in modules]
        self._take_back = lend_rotary(model, modules)
        # Beyond the vocabulary there are ids of features, see images.py; a model without images has none.
        takes_images = image_token(model.config) is not None
        self._first_image: int | None = model.get_input_embeddings().num_embeddings if takes_images else None

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._take_back()
        self._shown.clear()

    def kept(self, tokens: int) -> int:
        """How many of a prompt's tokens stay: known before where the press has `kept`, else at most all of them."""
        known = getattr(self.press, "kept", None)
        return tokens if known is None else int(known(tokens))

    def images_in(self, prompt: Sequence[int]) -> Tensor | None:
        """Which tokens of a prompt are of images, bool (T); None for a model that takes none."""
        return None if self._first_image is None else torch.as_tensor(prompt) >= self._first_image

    def refuse(self, pruned: Pruned, why: str) -> None:
        """Fail a prompt that is being prepared."""
        pruned.has_failed = True
        self.failed.setdefault(pruned.request_id, ValueError(why))

    # -- a layer ---------------------------------------------------------------------------------------------------------
    def _show(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("cu_seq_lens_q") is not None:  # an engine's
            self._shown[module] = args, kwargs

    def begin(self, module: nn.Module) -> None:
        """Attention of a module begins."""
        self._module, self._now = module, self._shown.pop(module, None)
        self._shown.clear()  # modules around it, which are no attention

    def _part(self, chunk: Chunk) -> Shown:
        if self._now is None:
            raise RuntimeError(f"{type(self._module).__name__} was not shown to the press: it was compiled, or replaced")
        args, kwargs = self._now
        for name in ("alibi", "position_bias"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self._module).__name__} counts distances in the cache ({name}), which pruning changes")
        part = slice(chunk.at, chunk.at + chunk.exact)
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        turns = kwargs.get("position_embeddings")
        return hidden[:, part], None if turns is None else (turns[0][:, part], turns[1][:, part])

    def stage(self, layer: int, chunk: Chunk) -> None:
        """Keep what a chunk shows until its prompt ends."""
        assert chunk.staging is not None
        try:
            hidden, turns = self._part(chunk)
        except Exception as error:
            self._fail(chunk, error)
            return
        chunk.staging.shown[layer].append((hidden.clone(), None if turns is None else (turns[0].clone(), turns[1].clone())))

    def prune(self, layer: int, chunk: Chunk, keys: Tensor, values: Tensor) -> list[Tensor]:
        """What stays of a whole prompt's keys and values (H, T, d) -> (H, n, d), n the same in all layers."""
        told, count = chunk.pruned, keys.shape[1]
        assert told is not None
        if not told.has_failed:
            try:
                found = self._pressed(layer, chunk, keys, values)
                if layer == 0:
                    self._settle(chunk, found[0].shape[1], count)
                self._check(chunk, found, keys)
            except Exception as error:
                self._fail(chunk, error)
            else:
                return found
        return [keys[:, : told.kept], values[:, : told.kept]]  # as long as the others: nobody reads it

    def _fail(self, chunk: Chunk, error: Exception) -> None:
        assert chunk.pruned is not None
        chunk.pruned.has_failed = True
        self.failed.setdefault(chunk.pruned.request_id, error)

    def _pressed(self, layer: int, chunk: Chunk, keys: Tensor, values: Tensor) -> list[Tensor]:
        assert chunk.pruned is not None
        parts = [*(chunk.staging.shown[layer] if chunk.staging is not None else ()), self._part(chunk)]
        hidden = torch.cat([part[0] for part in parts], dim=1)
        named: dict[str, Any] = {}
        if parts[0][1] is not None:
            named["position_embeddings"] = tuple(torch.cat([part[1][side] for part in parts], dim=1) for side in (0, 1))
        if (images := chunk.pruned.request.images) is not None:
            named[IMAGE_TOKENS] = images[None]
        found = self.press.compress(self._module, hidden, keys[None], values[None], None, named)
        if chunk.staging is not None:
            chunk.staging.shown[layer].clear()
        if getattr(self._module, "masked_key_indices", None) is not None:
            raise ValueError(
                f"{type(self.press).__name__} lets heads keep different numbers of tokens; pages hold as many of all"
            )
        return [side[0] for side in found]

    def _settle(self, chunk: Chunk, kept: int, count: int) -> None:
        """The first layer says how many tokens stay; the request was prepared for as many as were expected."""
        told = chunk.pruned
        assert told is not None
        if not 0 < kept <= told.kept:
            raise ValueError(f"{type(self.press).__name__} keeps {kept} of {count} tokens; 1 to {told.kept} were expected")
        request, less = told.request, told.kept - kept
        request.stored, request.pruned, told.kept = request.stored - less, request.pruned + less, kept
        request.coded = self.config.coded_tokens(request.stored)
        self.pruned_tokens += count - kept

    def _check(self, chunk: Chunk, found: list[Tensor], keys: Tensor) -> None:
        assert chunk.pruned is not None
        shape = (keys.shape[0], chunk.pruned.kept, keys.shape[2])
        for side in found:
            if side.shape != shape:
                raise ValueError(
                    f"{type(self.press).__name__} makes keys and values of {tuple(side.shape)} where {shape} is expected: "
                    "blocks hold as many tokens of all heads and layers"
                )
