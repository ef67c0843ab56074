"""StableLM: Llama's layers under LayerNorm."""

from dataclasses import replace

from sp3llm.models.families.llama import COMMON_DEFAULTS, LLAMA, LLAMA_LAYER, QKV_BIAS
from sp3llm.models.families.schema import RESIDUAL, Axes

LAYER_NORMS: dict[str, Axes] = {
    f"{norm}.{part}": (RESIDUAL,)
    for norm in ("input_layernorm", "post_attention_layernorm")
    for part in ("weight", "bias")
}
STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    defaults={
        **{k: v for k, v in COMMON_DEFAULTS.items() if k != "rms_norm_eps"},
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    layer={**LLAMA_LAYER, **LAYER_NORMS},
    optional={"use_qkv_bias": QKV_BIAS},
    keys={"head_dim": None},
    centred=True,
    norm_bias=True,
    eps="layer_norm_eps",
    square=True,
    unsupported={
        "qk_layernorm": (False, "norms inside the heads are not in its table yet"),
        "use_parallel_residual": (False, "one norm read by two parallel blocks is not yet"),
    },
)
