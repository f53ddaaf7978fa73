"""Folders with tiny random models and the embedded model's tokenizer, and the command line as its users call it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_pqcache import demo
from hf_pqcache.cli import main

VOCABULARY = 4096


def llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers with one KV head of 16 numbers and 256 positions."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"num_key_value_heads": 1, "max_position_embeddings": 256, "vocab_size": VOCABULARY, **sizes, **ends}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def gpt2(seed: int = 0, positions: int = 256, heads: int = 2) -> Any:
    """A GPT-2 whose positions are learnt: there is nothing beyond them."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=heads, n_positions=positions, vocab_size=VOCABULARY, **ends))


def save(model: Any, folder: Path) -> str:
    """Write the model with a tokenizer -> the folder."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(demo.MODEL, name), folder / name)
    return str(folder)


def pqcache(*arguments: object) -> Result:
    """Run `pqcache` with these arguments."""
    return CliRunner().invoke(main, [str(x) for x in arguments])


def done(*arguments: object) -> Result:
    """Run `pqcache` and see that it succeeds."""
    result = pqcache(*arguments)
    assert result.exit_code == 0, result.output
    return result
