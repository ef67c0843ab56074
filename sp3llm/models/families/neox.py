"""GPT-NeoX (Pythia): LayerNorm, fused queries, keys and values, parallel blocks."""

from sp3llm.models.families.schema import (
    FFN,
    INTERLEAVED,
    QUERY,
    RESIDUAL,
    VOCAB,
    Family,
    Site,
)
from sp3llm.models.families.stablelm import LAYER_NORMS

_NEOX_ATTENTION = "attention.query_key_value"
GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    defaults={
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    embeddings={"gpt_neox.embed_in.weight": (VOCAB, RESIDUAL)},
    layer={
        **LAYER_NORMS,
        f"{_NEOX_ATTENTION}.weight": (INTERLEAVED, RESIDUAL),
        "attention.dense.weight": (RESIDUAL, QUERY),
        "mlp.dense_h_to_4h.weight": (FFN, RESIDUAL),
        "mlp.dense_h_to_4h.bias": (FFN,),
        "mlp.dense_4h_to_h.weight": (RESIDUAL, FFN),
        "mlp.dense_4h_to_h.bias": (RESIDUAL,),
    },
    optional={
        "attention_bias": {
            f"{_NEOX_ATTENTION}.bias": (INTERLEAVED,),
            "attention.dense.bias": (RESIDUAL,),
        }
    },
    sites=(
        Site("input_layernorm", (_NEOX_ATTENTION,), "attention"),
        Site("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
    ),
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layer_prefix="gpt_neox.layers.{layer}.",
    ignored_suffixes=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    keys={"num_key_value_heads": None, "head_dim": None},
    centred=True,
    norm_bias=True,
    eps="layer_norm_eps",
    square=True,
    parallel="use_parallel_residual",
)
