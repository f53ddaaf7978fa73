"""What the tests on GPUs share: a small random Llama whose shape has tuned kernels, codebooks for it, distances of results."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from hf_pqcache.codebook.codebook import Codebook

KV_HEADS, HEAD_DIM, VOCABULARY = 2, 64, 500


def llama_config(layers: int) -> LlamaConfig:
    """Four query heads for each KV head; weights large enough that logits differ clearly."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def random_book(num_subspaces: int = 64, num_bits: int = 8) -> Codebook:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 1 << num_bits, HEAD_DIM // num_subspaces)
    return Codebook(*(torch.randn(shape, generator=generator).clamp(-2, 2).mul(0.5).half() for _ in range(2)))


def first_difference(a: Any, b: Any) -> float:
    """Largest relative distance of the logits of two outputs of `generate`, up to the first step whose tokens differ.

    One may have more steps than the other after the same prompt.
    """
    worst = 0.0
    new_a, new_b = a.sequences[:, -len(a.logits) :].T.cpu(), b.sequences[:, -len(b.logits) :].T.cpu()
    for x, y, tokens, others in zip(a.logits, b.logits, new_a, new_b, strict=False):
        x, y = x.cpu().float(), y.cpu().float()
        worst = max(worst, float((x - y).norm() / y.norm()))
        if not torch.equal(tokens, others):
            break
    return worst
