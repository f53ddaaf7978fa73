"""A model that reads keys and values itself, past transformers' attention interface; what released ones do may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from hf_pqcache.models.names import NAMES


class ReaderConfig(LlamaConfig):
    model_type = "reads_keys_itself"


class ReaderAttention(LlamaAttention):
    """Llama's attention, written out with matrix products over what `update` returns."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        key, value = (torch.repeat_interleave(x, self.num_key_value_groups, dim=1) for x in (key, value))
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        out = torch.matmul(nn.functional.softmax(scores, dim=-1), value)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class ReaderModel(LlamaModel):
    config_class = ReaderConfig
    _supports_sdpa = False

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = ReaderAttention(config, index)
        self.post_init()


class ReaderForCausalLM(LlamaForCausalLM):
    config_class = ReaderConfig
    _supports_sdpa = False

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__(config)
        self.model = ReaderModel(config)
        self.post_init()


AutoModel.register(ReaderConfig, ReaderModel)
AutoModelForCausalLM.register(ReaderConfig, ReaderForCausalLM)
