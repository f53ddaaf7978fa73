"""Whether a press may press a model's prompts, and what it is lent for that; knows no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from hf_pqcache.compressors.parse import parse
from hf_pqcache.compressors.press import Press


def prepared(press: Press | str, model: Any) -> Press:
    """A press by its name or itself, ready for a model.

    Raises ValueError for what is no press or does more than compress a prompt, and for an encoder-decoder model; RuntimeError
    for a compiled model.
    """
    chosen = parse(press) if isinstance(press, str) else press
    _check(chosen, model)
    prepare = getattr(chosen, "post_init_from_model", None)
    if prepare is not None:
        prepare(model)
    return chosen


def _check(press: Any, model: Any) -> None:
    if not isinstance(press, Press):
        raise ValueError(f"{press!r} is no press: expected a name like snapkv:0.5, or an object with compress(...)")
    for method, what in (
        ("forward_hook", "more than compress a prompt, maybe prune while decoding"),
        ("__call__", "passes of its own"),
    ):
        if sum(method in vars(kind) for kind in type(press).__mro__) > 1:  # kvpress' base class has one
            raise ValueError(f"{type(press).__name__} does {what} (its own {method}), which no press here may: use another one")
    if model.config.is_encoder_decoder:
        raise ValueError("an encoder-decoder model's prompt is the encoder's, whose keys and values are not pruned")
    parts = [model, *(part for part in model.modules() if part._compiled_call_impl is not None)]
    if isinstance(model, OptimizedModule) or len(parts) > 1:
        raise RuntimeError("hooks of a compiled model may never run: pass the model as it was before torch.compile")


def lend_rotary(model: Any, modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Let attention modules have the model's rotary embedding, where kvpress' presses look for it -> what takes it back."""
    rotary = next((part.rotary_emb for part in model.modules() if hasattr(part, "rotary_emb")), None)
    lent = [part for part in modules if rotary is not None and not hasattr(part, "rotary_emb")]
    for part in lent:
        part.__dict__["rotary_emb"] = rotary

    def take_back() -> None:
        while lent:
            del lent.pop().__dict__["rotary_emb"]

    return take_back
