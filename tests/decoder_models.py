"""Decoders of transformers, tiny and of random weights, by the names of their configurations."""

from __future__ import annotations

import inspect

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
SIZES = {  # every name that configurations have for them
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 4096, "n_positions": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "decoder_start_token_id": 1,
    "initializer_range": 0.3, "is_decoder": True, "attention_dropout": 0.0,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "hidden_size_per_layer_input": 8,
    "intermediate_size": 32, "ffn_hidden_size": 32, "ffn_dim": 32, "n_inner": 32, "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "head_dim": 8,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "rotary_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
LATENT = {"num_key_value_heads": 4}
WINDOWED = (
    "afmoe", "cohere2", "cohere2_moe", "cwm", "exaone4", "exaone_moe", "gemma3_text", "gemma4_text",
    "gemma4_unified_text", "kolibri1", "ministral", "modernbert-decoder", "olmo3",
)  # fmt: skip
WITH_LATENTS = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa",
    "hy_v4", "minicpm3", "youtu",
)  # fmt: skip
SETTINGS = {  # what single configurations need beside
    **dict.fromkeys(WINDOWED, SLIDING),
    **dict.fromkeys(WITH_LATENTS, LATENT),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR),
    **dict.fromkeys(("lfm2", "lfm3"), CONVOLUTION),
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "use_mamba_kernels": False, "mamba_d_state": 8,
    },
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16, "intermediate_size_mlp": 32,
    },
    "longcat_flash": LATENT | {"num_layers": 1, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "mistral": {"sliding_window": None},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "ernie4_5_moe": {"moe_k": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "kimi_linear": LATENT | {
        "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "bailing_hybrid": LATENT | {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "zamba": {
        "num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4,
        "use_mamba_kernels": False, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
NOT_MADE = {  # with several parts, of which the decoder is listed by itself, or too large, or with other inputs
    "blt", "cohere_compass_text", "dbrx", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4",
    "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama",
    "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    "qwen4_exp_text", "reformer", "roc_bert", "xlm", "xlstm", "xmod",
}  # fmt: skip
CLASSES = {
    kind: name
    for kind, name in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "mllama_text_model": "MllamaForCausalLM"}.items()
    if kind not in NOT_MADE
}
KINDS = {name: kind for kind, name in reversed(CLASSES.items())}  # a configuration of each class


def make_decoder(kind: str) -> PreTrainedModel:
    """Make the causal language model of the configuration `kind`, ready for inference."""
    config_class = CONFIG_MAPPING[kind]
    known = inspect.signature(config_class).parameters.keys() | config_class.__dataclass_fields__.keys()
    values = {name: value for name, value in SIZES.items() if name in known}
    torch.manual_seed(0)
    return getattr(transformers, CLASSES[kind])(config_class(**values | SETTINGS.get(kind, {}))).eval()
