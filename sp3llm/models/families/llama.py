"""Llama and its like: RMSNorm, rotary embedding, gated FFN."""

from dataclasses import replace
from typing import Any

from sp3llm.models.families.schema import (
    FFN,
    HEAD_DIM,
    KEY_VALUE,
    LLAMA_CPP,
    QUERY,
    RESIDUAL,
    SERVERS,
    VOCAB,
    Axes,
    Family,
    ServedAs,
    Site,
)

LLAMA_LAYER: dict[str, Axes] = {
    "input_layernorm.weight": (RESIDUAL,),
    "self_attn.q_proj.weight": (QUERY, RESIDUAL),
    "self_attn.k_proj.weight": (KEY_VALUE, RESIDUAL),
    "self_attn.v_proj.weight": (KEY_VALUE, RESIDUAL),
    "self_attn.o_proj.weight": (RESIDUAL, QUERY),
    "post_attention_layernorm.weight": (RESIDUAL,),
    "mlp.gate_proj.weight": (FFN, RESIDUAL),
    "mlp.up_proj.weight": (FFN, RESIDUAL),
    "mlp.down_proj.weight": (RESIDUAL, FFN),
}
QKV_BIAS: dict[str, Axes] = {
    "self_attn.q_proj.bias": (QUERY,),
    "self_attn.k_proj.bias": (KEY_VALUE,),
    "self_attn.v_proj.bias": (KEY_VALUE,),
}
_ATTENTION_BIAS: dict[str, Axes] = {**QKV_BIAS, "self_attn.o_proj.bias": (RESIDUAL,)}
_MLP_BIAS: dict[str, Axes] = {
    "mlp.gate_proj.bias": (FFN,),
    "mlp.up_proj.bias": (FFN,),
    "mlp.down_proj.bias": (RESIDUAL,),
}
COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    embeddings={"model.embed_tokens.weight": (VOCAB, RESIDUAL)},
    layer=LLAMA_LAYER,
    optional={"attention_bias": _ATTENTION_BIAS, "mlp_bias": _MLP_BIAS},
    sites=(
        Site(
            "input_layernorm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn",
        ),
        Site("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096 * 32,
    },
    optional={},
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    layer={**LLAMA_LAYER, **QKV_BIAS},
    optional={},
    layer_lists={"layer_types": "use_sliding_window"},
    square_in=SERVERS,
    served_as=ServedAs(
        model_type="llama",
        config={"attention_bias": True, "mlp_bias": False},
        silent={"bos_token_id": None, "eos_token_id": None},
        dropped=(
            *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
            # vLLM's Llama reads it, and without it goes by attention_bias.
            "qkv_bias",
        ),
        zeros=("self_attn.o_proj.bias",),
        unlike={"dual_chunk_attention_config": "attends in chunks in vLLM"},
    ),
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    layer={
        **LLAMA_LAYER,
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
    },
    optional={"attention_bias": _ATTENTION_BIAS},
    square_in=(),
    served_as=None,
)

GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "intermediate_size": 24576,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    optional={"attention_bias": _ATTENTION_BIAS},
    norm_offset=1.0,
    scales_embeddings=True,
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults={**LLAMA.defaults, "residual_multiplier": 1.0, "logits_scaling": 1.0},
    residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
    square_in=(LLAMA_CPP,),
)
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    # Its class makes the types of layers from the other list.
    layer_lists={"layer_types": None, "no_rope_layers": "no_rope_layer_interval"},
)
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    layer={
        "input_layernorm.weight": (RESIDUAL,),
        "self_attn.qkv_proj.weight": ((QUERY, KEY_VALUE, KEY_VALUE), RESIDUAL),
        "self_attn.o_proj.weight": (RESIDUAL, QUERY),
        "post_attention_layernorm.weight": (RESIDUAL,),
        "mlp.gate_up_proj.weight": ((FFN, FFN), RESIDUAL),
        "mlp.down_proj.weight": (RESIDUAL, FFN),
    },
    optional={},
    sites=(
        Site("input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
        Site("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
    ),
    square_rope_types=("longrope", "su", "yarn"),
    square_in=(LLAMA_CPP,),
)
