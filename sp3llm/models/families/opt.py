"""OPT: LayerNorm, learned positions, biases, projections around the embeddings."""

from sp3llm.models.families.llama import QKV_BIAS
from sp3llm.models.families.schema import (
    EMBEDDING,
    FFN,
    KEY_VALUE,
    POSITIONS,
    QUERY,
    RESIDUAL,
    VOCAB,
    Family,
    Site,
)

OPT = Family(
    model_type="opt",
    gguf=False,
    architecture="OPTForCausalLM",
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "num_attention_heads": 12,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
    },
    embeddings={
        "model.decoder.embed_tokens.weight": (VOCAB, EMBEDDING),
        "model.decoder.embed_positions.weight": (POSITIONS, RESIDUAL),
    },
    layer={
        "self_attn_layer_norm.weight": (RESIDUAL,),
        "self_attn_layer_norm.bias": (RESIDUAL,),
        "self_attn.q_proj.weight": (QUERY, RESIDUAL),
        "self_attn.k_proj.weight": (KEY_VALUE, RESIDUAL),
        "self_attn.v_proj.weight": (KEY_VALUE, RESIDUAL),
        "self_attn.out_proj.weight": (RESIDUAL, QUERY),
        "final_layer_norm.weight": (RESIDUAL,),
        "final_layer_norm.bias": (RESIDUAL,),
        "fc1.weight": (FFN, RESIDUAL),
        "fc2.weight": (RESIDUAL, FFN),
    },
    optional={
        "enable_bias": {
            **QKV_BIAS,
            "self_attn.out_proj.bias": (RESIDUAL,),
            "fc1.bias": (FFN,),
            "fc2.bias": (RESIDUAL,),
        }
    },
    sites=(
        Site(
            "self_attn_layer_norm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn",
        ),
        Site("final_layer_norm", ("fc1",), "fc2"),
    ),
    writers=("self_attn.out_proj", "fc2"),
    final_norm="model.decoder.final_layer_norm",
    layer_prefix="model.decoder.layers.{layer}.",
    keys={"intermediate_size": "ffn_dim", "num_key_value_heads": None, "head_dim": None},
    centred=True,
    norm_bias=True,
    eps=1e-5,
    square=True,
    rotary=False,
    projections=("model.decoder.project_in", "model.decoder.project_out"),
    position_offset=2,
    unsupported={
        "do_layer_norm_before": (
            True,
            "its norms sit after the sublayer, on the stream, so no exact rotation exists "
            "(opt-350m is the one size of OPT like that)",
        ),
        "layer_norm_elementwise_affine": (True, "norms without weights are not in its table"),
        "_remove_final_layer_norm": (False, "a head that reads the raw stream is not in its table"),
    },
)
