"""The queries of an attention module, from what goes into it; knows the ways that transformers' models make them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def project(module: nn.Module, hidden_states: Tensor, head_dim: int) -> Tensor:
    """Queries (B, Hq, T, d) before their rotary embedding.

    Raises ValueError for a module that makes them in a way that is not known.
    """
    parts: Any = module
    if hasattr(module, "q_proj"):
        out = parts.q_proj(hidden_states)
    elif hasattr(module, "qkv_proj"):  # Phi-3: queries, keys and values in one matrix
        out = parts.qkv_proj(hidden_states)[..., : parts.config.num_attention_heads * head_dim]
    else:
        raise ValueError(f"{type(module).__name__} makes queries in a way that is not known; use knorm or streaming-llm")
    norm = getattr(module, "q_norm", None)
    is_flat = norm is not None and getattr(norm, "weight", out.new_empty(0)).shape[-1:] == out.shape[-1:]
    if is_flat:  # OLMo 2: over all heads at once
        out = parts.q_norm(out)
    heads = parts.config.num_attention_heads
    if out.shape[-1] not in (heads * head_dim, 2 * heads * head_dim):
        raise ValueError(f"{type(module).__name__} has queries of {out.shape[-1]} numbers, not {heads} times {head_dim}")
    out = out.unflatten(-1, (heads, -1))[..., :head_dim]  # Qwen3-Next has a gate behind each head's query
    if norm is not None and not is_flat:
        out = parts.q_norm(out)
    return out.transpose(1, 2)


def rotate(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, Hq, T, d) after the model's own rotary embedding by cos, sin (B or 1, T, d).

    It is linear in all three: means of cosines give the mean of what they rotate to.
    """
    function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        raise ValueError(f"{type(module).__name__} turns queries in a way that is not known; use knorm or streaming-llm")
    turned: Tensor = function(x, x, cos, sin)[0]
    return turned


def next_rotations(cos: Tensor, sin: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (B or 1, 1, d) of the cosines and sines of the `count` positions that follow those of cos, sin (B or 1, T, d).

    A position turns each channel by its own angle; two neighbours tell it.
    """
    turns = torch.complex(cos.double(), sin.double())
    step = turns[:, 1:2] / turns[:, :1] if turns.shape[1] > 1 else turns[:, :1] / turns[:, :1].abs()
    steps = torch.arange(1, count + 1, device=cos.device, dtype=torch.float64)[:, None]
    mean = turns[:, -1:] * torch.polar(torch.ones_like(steps), steps * step.angle()).mean(dim=1, keepdim=True)
    return mean.real.to(cos.dtype), mean.imag.to(sin.dtype)
