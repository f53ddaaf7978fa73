"""Attention functions that transformers itself wrote, and what each of them computes; knows no cache and no handle.

The fused attention may stand in only for mathematics that is known. Everything else, a function that the user registered,
a wrapper around transformers' own, the code of a model from the Hub, is called as it is, with dense keys and values.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing


class Known(NamedTuple):
    """What a function computes beyond softmax(query @ key * scaling + mask) @ value.

    Attributes:
        caps: whether it honours the keyword `softcap`.
        sinks: where it takes attention sinks from: nowhere, the keyword `s_aux`, or `module.sinks`.
        has_weights: whether it returns attention weights, or anything in their place.
        has_flat_mask: whether its mask is flash attention's (B, n), ones where a token is; else (B, 1, T, n), additive.
        has_bool_mask: whether a mask may also be bool, True where it attends.
    """

    caps: bool = False
    sinks: str = ""
    has_weights: bool = True
    has_flat_mask: bool = False
    has_bool_mask: bool = False


_LIBRARY: dict[Any, Known] = {
    sdpa_attention_forward: Known(has_weights=False, has_bool_mask=True),
    flash_attention_forward: Known(caps=True, sinks="s_aux", has_weights=False, has_flat_mask=True),
    flex_attention_forward: Known(caps=True, sinks="s_aux"),
}

#: All that the eager functions of transformers' model files name (5.17 to 5.24). One that names anything else, say an
#: attribute of its module, computes something new.
_VOCABULARY = set(
    """F cat contiguous device dropout dtype expand float float32 functional getattr hasattr head_dim logsumexp matmul max
    maybe_autocast nn num_key_value_groups repeat_kv reshape shape sigmoid sinks size softmax tanh to torch training transpose
    type unsqueeze values view""".split()  # noqa: SIM905 - a list of them fills half a page
)


def known(function: Any) -> Known | None:
    """What `function` computes, None if transformers did not write it or it computes something new."""
    if not isinstance(function, FunctionType):
        return None
    if function is sdpa_attention_forward and not inspect.isbuiltin(functional.scaled_dot_product_attention):
        return None  # somebody has put another function in place of torch's
    return _LIBRARY.get(function) or _known_eager(function)


def _known_eager(function: FunctionType) -> Known | None:
    # `functools.wraps` gives a wrapper the name and module of what it wraps, but not its globals.
    if function.__closure__ or hasattr(function, "__wrapped__"):
        return None
    code, module = function.__code__, function.__globals__.get("__name__", "")
    if not module.startswith("transformers.models.") or not code.co_name.endswith("eager_attention_forward"):
        return None
    if not _VOCABULARY.issuperset(code.co_names):
        return None
    takes = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return Known(caps="softcap" in takes, sinks="module" if "sinks" in code.co_names else "")


def name_of(function: Any) -> str:
    """How a message calls an attention function."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that `module` comes from, as it is now.

    Every user of the attention interface names its default inside a method; it is a global of that file. Raises
    NotImplementedError if there is none.
    """
    file, name = _place_of_eager(type(module))
    function: Callable[..., Any] = getattr(file, name)
    return function


def call_eager_function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the file that `module` comes from; see `eager_function`."""
    return eager_function(module)(module, *args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place_of_eager(cls: type) -> tuple[Any, str]:
    """(module object of a file, name of its eager attention function); a compiler need not look how it is found."""
    return _find_eager(cls)


@cache
def _find_eager(cls: type) -> tuple[Any, str]:
    methods = [inspect.unwrap(cls.forward)]  # type: ignore[attr-defined]
    methods += [f for base in cls.__mro__ for f in map(inspect.unwrap, vars(base).values()) if isinstance(f, FunctionType)]
    for is_it in (lambda name, _: name.endswith("eager_attention_forward"), _may_be_default):
        for method in methods:
            for name in method.__code__.co_names:
                if name in method.__globals__ and is_it(name, method):
                    return _file_of(method), name
    raise NotImplementedError(
        f"{cls.__name__} names no eager attention function; load the model with attn_implementation='sdpa'"
    )


def _file_of(function: FunctionType) -> Any:
    """The module object whose globals a function uses."""
    file = sys.modules.get(function.__globals__.get("__name__", ""))
    if file is not None and vars(file) is function.__globals__:
        return file
    return SimpleNamespace(**function.__globals__)


def _may_be_default(name: str, method: FunctionType) -> bool:
    """Whether a global that a method names may be the default it gives `get_interface`, whatever it is called."""
    function = method.__globals__[name]
    if "get_interface" not in method.__code__.co_names or not isinstance(function, FunctionType):
        return False
    return {"query", "key", "value", "attention_mask"}.issubset(function.__code__.co_varnames[: function.__code__.co_argcount])


def wants_weights(module: nn.Module) -> bool:
    """Whether somebody may look at the attention weights that `module` returns: as asked for, by a hook, or in its own code."""
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    everywhere = getattr(torch.nn.modules.module, "_global_forward_hooks", {})
    if any(not _is_idle(hook) for hooks in (module._forward_hooks, everywhere) for hook in hooks.values()):
        return True
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # replaced by hand; accelerate passes results on
        return True
    forward: Any = inspect.unwrap(type(module).forward)
    return not forward.__globals__.get("__name__", "").startswith("transformers.")


def _is_idle(hook: Any) -> bool:
    """Whether a forward hook is ours, or one that transformers leaves once outputs were asked for, and they are not now."""
    if getattr(hook, "reads_no_weights", False):
        return True
    code = getattr(hook, "__code__", None)
    if code is None or hook.__globals__.get("__name__") != output_capturing.__name__:
        return False
    active = getattr(output_capturing, "_active_collector", None)
    return active is not None and not any("attention" in key for key in active.get() or ())
