"""What a model's code seems to do with keys and values, read before it has run; knows no cache.

A first guess, for `generate` asks whether it may compile before anything has run. What the first pass shows counts more.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_pqcache.models.shapes import has_latent_attention

#: What a handle in compiled code answers without decoding.
_ANSWERED = {"dtype", "device", "shape", "to"}
#: Python 3.11 loses count of its recursion where two threads parse at once (SystemError).
_READING = threading.Lock()


def gives_attention_what_it_caches(config: PreTrainedConfig) -> bool:
    """Whether every module of the model's file that updates a cache hands what it gets to the attention function it looks up.

    Others (Falcon) read keys themselves, expand them (DeepSeek's latent attention) or compute with them (DiffLlama, Doge).
    """
    if has_latent_attention(config):
        return False
    try:
        model_class: Any = MODEL_MAPPING[type(config)]
    except KeyError:
        return False
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    forwards = [
        inspect.unwrap(c.forward)
        for c in vars(sys.modules[model_class.__module__]).values()
        if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__ == model_class.__module__
    ]
    updaters = [forward for forward in forwards if "update" in forward.__code__.co_names]
    with _READING:
        return bool(updaters) and all("get_interface" in f.__code__.co_names and _only_hands_on(f) for f in updaters)


@cache
def _only_hands_on(forward: Any) -> bool:
    return not any(_uses(forward))


def _uses(forward: Any) -> Iterator[str]:
    """What `forward` computes with the result of `update`, other than to pass it to the attention function or on."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    lines: dict[str, int] = {}
    functions: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            called = node.value.func.attr if isinstance(node.value.func, ast.Attribute) else None
            if called == "update":
                lines |= dict.fromkeys(names, node.lineno)
            elif called == "get_interface":
                functions |= names
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno > lines.get(node.id, sys.maxsize):
            user = parents[node]
            user = parents[user] if isinstance(user, ast.keyword) else user
            if not _only_passes_on(user, functions):
                yield ast.unparse(user)


def _only_passes_on(user: ast.AST, functions: set[str]) -> bool:
    """Whether a node that uses a tensor reads no number of it: a call of one of `functions` or of a method, a tuple."""
    if isinstance(user, ast.Call):
        called = user.func
        is_method = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self"
        return is_method or (isinstance(called, ast.Name) and called.id in functions)
    if isinstance(user, ast.Attribute):
        return user.attr in _ANSWERED
    return isinstance(user, (ast.Tuple, ast.List, ast.Dict, ast.Assign, ast.Return))
