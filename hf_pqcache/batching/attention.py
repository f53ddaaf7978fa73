"""Attention of one step of the engine: prompts exactly, decode steps from pages; knows no transformers.

A step is a list of chunks, one for each request in it. A prompt's tokens attend to one another as they came, also when it
comes in several steps; only then are they stored. A generated token is stored, then attends to what is stored, as in
`generate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from hf_pqcache.backends import torch_backend
from hf_pqcache.batching.kernels import KernelRows
from hf_pqcache.batching.requests import Chunk
from hf_pqcache.batching.slots import SlotLayers


def attend_exactly(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of n tokens: query (Hq, T, d), keys and values (H, n, d) -> (Hq, T, d)."""
    attend, group = functional.scaled_dot_product_attention, query.shape[0] // keys.shape[0]
    new, total = query.shape[1], keys.shape[1]
    if new == total:
        sides = (query[None], keys[None], values[None])
        return attend(*sides, is_causal=True, scale=scale, enable_gqa=group > 1)[0]
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    return attend(query[None], keys[None], values[None], attn_mask=causal_lower_right(new, total), scale=scale)[0]


def attend_prompt(
    layers: SlotLayers, layer: int, chunk: Chunk, query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """The part of a prompt that is in a chunk: query (Hq, T, d), keys, values (H, T, d) -> (Hq, T, d).

    Its keys and values are stored, or wait as the chunk says.
    """
    staged = [] if chunk.staging is None else chunk.staging.layers[layer]
    whole = [torch.cat([*(part[side] for part in staged), x], dim=1) if staged else x for side, x in enumerate((keys, values))]
    seen = whole
    if chunk.stored:
        old = [layers.tokens(layer, which, chunk.slot, chunk.stored, chunk.coded) for which in ("key", "value")]
        seen = [torch.cat(pair, dim=1) for pair in zip(old, whole, strict=True)]
    out = attend_exactly(query, seen[0], seen[1], scale)
    if chunk.keeps:
        # What came is a view of the packed input, which the next step of a graph overwrites.
        staged.append((keys.clone(), values.clone()))
        if chunk.pruned is not None:
            chunk.pruned.pruning.stage(layer, chunk)
        return out
    if chunk.pruned is not None:
        whole = chunk.pruned.pruning.prune(layer, chunk, *whole)
    if chunk.job is not None:
        chunk.job.sides.append((keys.clone(), values.clone()) if whole[0] is keys else (whole[0], whole[1]))
    else:
        layers.store(layer, chunk.slot, whole[0], whole[1], chunk.stored, chunk.coded)
    staged.clear()
    return out


def attend_generated(
    layers: SlotLayers,
    layer: int,
    slot: int,
    stored: int,
    coded: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """Generated tokens one after the other, in plain torch: query (Hq, T, d), keys, values (H, T, d) -> (Hq, T, d)."""
    parts = []
    for i in range(query.shape[1]):
        layers.store(layer, slot, keys[:, i : i + 1], values[:, i : i + 1], stored, coded)
        coded = layers.coded_after(coded, stored + 1)
        stored += 1
        dense = [layers.tokens(layer, which, slot, stored, coded)[None] for which in ("key", "value")]
        q = query[None, :, i : i + 1]
        out = torch_backend.attend_dense(q, dense[0], dense[1], None, None, scale, 0.0, [stored], [0])  # (1, 1, Hq, d)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts, dim=1)


def attend_step(
    layers: SlotLayers,
    rows: KernelRows | None,
    layer: int,
    chunks: Sequence[Chunk],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """One layer of a step: query (Hq, T, d), keys, values (H, T, d), packed -> (T, Hq, d), zeros at padding.

    rows: of kernels; without, plain torch computes generated tokens, one request after the other.
    """
    out = torch.zeros_like(query)
    together = [chunk for chunk in chunks if chunk.is_decode] if rows is not None else []
    if rows is not None and together:
        if layer == 0:
            rows.begin_beside_prompts(together)
        rows.attend_beside_prompts(layer, query, keys, values, scale, out)
    for chunk in chunks:
        if rows is not None and chunk.is_decode:
            continue
        if layer == 0:
            layers.use_blocks(chunk.slot, chunk.blocks)
            if chunk.sinks is not None:
                layers.write_sinks(chunk.slot, chunk.sinks)
        stored, coded, middle = chunk.stored, chunk.coded, chunk.at + chunk.exact
        if chunk.exact:
            part = slice(chunk.at, middle)
            out[:, part] = attend_prompt(layers, layer, chunk, query[:, part], keys[:, part], values[:, part], scale)
            stored += chunk.gains
            coded = layers.coded_after(coded, stored)
        if chunk.count > chunk.exact:
            part = slice(middle, chunk.at + chunk.count)
            sides = (query[:, part], keys[:, part], values[:, part])
            if rows is None:
                out[:, part] = attend_generated(layers, layer, chunk.slot, stored, coded, *sides, scale)
            else:
                out[:, part] = rows.attend_in_turn(layer, chunk, stored, coded, sides, scale)
    return out.transpose(0, 1)
