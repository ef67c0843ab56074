"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE."""

from dataclasses import replace

from sp3llm.models.families.llama import (
    COMMON_DEFAULTS,
    LLAMA,
    LLAMA_LAYER,
    MISTRAL,
    QKV_BIAS,
    QWEN3,
)
from sp3llm.models.families.schema import (
    EACH,
    EXPERT_FFN,
    EXPERTS,
    FFN,
    ONE,
    RESIDUAL,
    SERVERS,
    SHARED_FFN,
    Axes,
    Experts,
    Site,
    Table,
)


def _attention(layer: Table) -> dict[str, Axes]:
    """A layer's table without its FFN."""
    return {name: axes for name, axes in layer.items() if not name.startswith("mlp.")}


MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        **MISTRAL.defaults,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    experts=Experts(
        number=("num_experts", "num_local_experts"),
        layer={
            **_attention(LLAMA_LAYER),
            "block_sparse_moe.gate.weight": (EXPERTS, RESIDUAL),
            f"block_sparse_moe.experts.{EACH}.w1.weight": (FFN, RESIDUAL),
            f"block_sparse_moe.experts.{EACH}.w3.weight": (FFN, RESIDUAL),
            f"block_sparse_moe.experts.{EACH}.w2.weight": (RESIDUAL, FFN),
        },
        site=Site(
            "post_attention_layernorm",
            (
                "block_sparse_moe.gate",
                f"block_sparse_moe.experts.{EACH}.w1",
                f"block_sparse_moe.experts.{EACH}.w3",
            ),
            "mlp",
        ),
        writers=(f"block_sparse_moe.experts.{EACH}.w2",),
        fused={
            "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
            "mlp.experts.gate_up_proj": (
                f"block_sparse_moe.experts.{EACH}.w1.weight",
                f"block_sparse_moe.experts.{EACH}.w3.weight",
            ),
            "mlp.experts.down_proj": (f"block_sparse_moe.experts.{EACH}.w2.weight",),
        },
    ),
)

_QWEN_EXPERTS: dict[str, Axes] = {
    "mlp.gate.weight": (EXPERTS, RESIDUAL),
    f"mlp.experts.{EACH}.gate_proj.weight": (EXPERT_FFN, RESIDUAL),
    f"mlp.experts.{EACH}.up_proj.weight": (EXPERT_FFN, RESIDUAL),
    f"mlp.experts.{EACH}.down_proj.weight": (RESIDUAL, EXPERT_FFN),
}
_QWEN_EXPERTS_READ = (
    "mlp.gate",
    f"mlp.experts.{EACH}.gate_proj",
    f"mlp.experts.{EACH}.up_proj",
)
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer_lists={"layer_types": None},
    defaults={
        **COMMON_DEFAULTS,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
    experts=Experts(
        number=("num_local_experts", "num_experts"),
        layer={**_attention(QWEN3.layer), **_QWEN_EXPERTS},
        site=Site("post_attention_layernorm", _QWEN_EXPERTS_READ, "mlp"),
        writers=(f"mlp.experts.{EACH}.down_proj",),
        fused={
            "mlp.experts.gate_up_proj": (
                f"mlp.experts.{EACH}.gate_proj.weight",
                f"mlp.experts.{EACH}.up_proj.weight",
            ),
            "mlp.experts.down_proj": (f"mlp.experts.{EACH}.down_proj.weight",),
        },
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
    ),
)
QWEN2_MOE = replace(
    LLAMA,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults={
        **QWEN3_MOE.defaults,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "qkv_bias": True,
    },
    optional={"qkv_bias": QKV_BIAS},
    layer_lists={"layer_types": "use_sliding_window"},
    square_in=SERVERS,
    experts=replace(
        QWEN3_MOE.experts,
        number=("num_experts",),
        layer={
            **_attention(LLAMA_LAYER),
            **_QWEN_EXPERTS,
            "mlp.shared_expert.gate_proj.weight": (SHARED_FFN, RESIDUAL),
            "mlp.shared_expert.up_proj.weight": (SHARED_FFN, RESIDUAL),
            "mlp.shared_expert.down_proj.weight": (RESIDUAL, SHARED_FFN),
            "mlp.shared_expert_gate.weight": (ONE, RESIDUAL),
        },
        site=Site(
            "post_attention_layernorm",
            (
                *_QWEN_EXPERTS_READ,
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert_gate",
            ),
            "mlp",
        ),
        writers=(f"mlp.experts.{EACH}.down_proj", "mlp.shared_expert.down_proj"),
    ),
)
