"""Every causal LM that the installed transformers knows, tiny: shrinks default configs by the names of their settings.

Knows no cache. An architecture whose settings say a size in a way of its own has its line in OVERRIDES.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: model_type of every architecture.
NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 128
#: Settings that mean the number of layers; a list of as many entries describes one layer each.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
#: Size -> the settings that are that large at most in a tiny model.
SIZES: dict[int, str] = {
    512: """max_position_embeddings n_positions max_target_positions max_seq_len model_max_length n_ctx
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base""",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    64: """hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width
        attention_hidden_size""",
    48: "intermediate_size intermediate_size_mlp ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_inner",
    32: """moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        chunk_size""",
    16: """head_dim attention_head_dim d_head dim_head kv_channels v_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank
        linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim index_head_dim""",
    8: "qk_rope_head_dim hidden_size_per_layer_input rotary_dim mamba_d_state sliding_window attention_chunk_size",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads
        linear_num_heads linear_num_value_heads num_experts num_local_experts n_routed_experts index_n_heads""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k""",
    1: "n_group topk_group num_expert_group",
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = ["sliding_attention", "full_attention"]
#: model_type -> settings that the rules above cannot guess.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_MIXED, _ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "num_hidden_layers": 8,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "layer_types": 2 * _MIXED,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"layer_types": 2 * _MIXED, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 24},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
#: For every architecture that has such a setting.
COMMON = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "use_cache": True, "is_decoder": True}
COMMON |= {"tie_word_embeddings": False, "mamba_n_heads": 8, "mamba_d_head": 16}


def small_config(name: str) -> Any:
    """A tiny config of an architecture, one layer of each kind that its default has, two at least."""
    return _shrunk(CONFIG_MAPPING[name]())


def _shrunk(config: Any) -> Any:
    known = inspect.signature(type(config)).parameters
    values = {key: vars(config)[key] for key in known if vars(config).get(key) is not None}
    depth = next((values[key] for key in DEPTHS if key in values), 0)
    layers = _layers(values, depth)
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            values[key] = _shrunk(value)
        elif isinstance(value, (list, tuple)) and depth > 2 and len(value) == depth:
            values[key] = [value[i] for i in layers]
        elif key in DEPTHS:
            values[key] = min(value, len(layers))
        elif isinstance(value, int) and not isinstance(value, bool):
            values[key] = min([value, *(size for size, keys in SIZES.items() if key in keys.split())])
    if "qk_rope_head_dim" in values:  # latent attention
        values |= {"head_dim": values["qk_rope_head_dim"], "num_key_value_heads": values["num_attention_heads"]}
    elif "head_dim" in known:
        values["head_dim"] = 16  # some defaults leave it None, which their models cannot use
    common = {key: value for key, value in COMMON.items() if key in known}
    return type(config)(**{**values, **common, **OVERRIDES.get(config.model_type, {})})


def _layers(values: dict[str, Any], depth: int) -> list[int]:
    kinds = next((values[key] for key in ("layer_types", "layers_block_type") if values.get(key)), ["full"] * depth)
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    return chosen if len(chosen) > 1 else list(range(min(2, depth)))


def build(name: str, implementation: str) -> Any:
    """A random model in float32 and eval mode whose tokens depend on attention."""
    config = small_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model
