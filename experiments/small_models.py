"""Small random models of the architectures in transformers, from their configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 512
_MOST_PARAMETERS = 5_000_000
_WIDEST = 4096

# Options of configurations, under all names that they have; a configuration gets those it knows.
_OPTIONS = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len",
    128: "intermediate_size ffn_dim decoder_ffn_dim n_inner d_ff ffn_hidden_size"
    " intermediate_size_mlp",
    64: "hidden_size d_model n_embd embed_dim dim n_embed embedding_size word_embed_proj_dim"
    " model_dim decoder_hidden_size moe_intermediate_size shared_expert_intermediate_size"
    " moe_shared_expert_intermediate_size",
    32: "sliding_window q_lora_rank kv_lora_rank mamba_d_head",
    16: "head_dim qk_nope_head_dim v_head_dim hidden_size_per_layer_input linear_key_head_dim"
    " linear_value_head_dim mamba_head_dim index_head_dim",
    8: "qk_rope_head_dim state_size time_step_rank mamba_d_state ssm_state_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head"
    " n_heads num_heads decoder_attention_heads encoder_attention_heads num_local_experts"
    " num_experts n_routed_experts mamba_n_heads mamba_num_heads linear_num_value_heads"
    " linear_num_key_heads index_n_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk"
    " eos_token_id",
    1: "encoder_layers n_group topk_group first_k_dense_replace mamba_n_groups bos_token_id"
    " decoder_start_token_id",
    0: "pad_token_id",
}
# What some architectures need besides; None: an option that they do not take.
_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"], _LATENT),
    **dict.fromkeys(["glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"], _LATENT),
    "youtu": _LATENT,
    "codegen": {"rotary_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": None, "num_kv_heads": None},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {"n_groups": 2},
    "xlstm": {"v_head_dim": None},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Layers whose weights are used without calling them, or not at all without an encoder.
EXCLUDED = {
    **dict.fromkeys(["doge", "falcon_mamba", "jamba", "mamba"], "*.dt_proj"),
    **dict.fromkeys(["bart", "bigbird_pegasus", "blenderbot", "marian"], "*.encoder_attn.*"),
    **dict.fromkeys(["blenderbot-small", "mbart", "mvp", "pegasus"], "*.encoder_attn.*"),
    **dict.fromkeys(["plbart", "trocr", "whisper"], "*.encoder_attn.*"),
    # No gradient goes through the choice of tokens.
    **dict.fromkeys(["deepseek_v32", "glm_moe_dsa", "hy_v4"], "*.indexer.*"),
}


class TooLargeError(ValueError):
    """A configuration cannot be made small by these options."""


def small_model(kind: str, **options: Any) -> PreTrainedModel:
    """Return a random model of an architecture, float32, in evaluation mode, the same every time.

    Args:
        kind: the name of the architecture in transformers (`model_type`).
        options: of its configuration.

    Raises:
        TooLargeError: it has parts that these options do not make small.
        Exception: whatever transformers raises for a configuration that does not fit together.
    """
    config = AutoConfig.for_model(kind, **{**_fitting(kind), **options})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    widest = max(max(p.shape) for p in empty.parameters() if p.dim() > 1)
    if sum(p.numel() for p in empty.parameters()) > _MOST_PARAMETERS or widest > _WIDEST:
        raise TooLargeError(f"{kind} has parts that stay large")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def _fitting(kind: str) -> dict[str, Any]:
    known = AutoConfig.for_model(kind)
    values = {name: value for value, names in _OPTIONS.items() for name in names.split()}
    fitting = {name: value for name, value in values.items() if _has(known, name)}
    return {k: v for k, v in {**fitting, **_SPECIAL.get(kind, {})}.items() if v is not None}


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # noqa: BLE001 (an option that differs among layers, which may be given)
        return True
