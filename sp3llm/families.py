"""Model families as data: which parameter lives on which axes, who reads and writes the stream.

Fold, rotate, cut, count and validate are generic loops over these tables. Matching is by
`config.model_type` and exact: a family that is not here is refused, never approximated.

Names are those on disk. A parameter's axes are given in the order of its shape.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sp3llm.errors import UserError

RESIDUAL = "hidden_size"
FFN = "intermediate_size"
QUERY = "num_attention_heads * head_dim"
KEY_VALUE = "num_key_value_heads * head_dim"
INTERLEAVED = "num_attention_heads * 3 * head_dim"
HEAD_DIM = "head_dim"
VOCAB = "vocab_size"
EMBEDDING = "word_embed_proj_dim"
POSITIONS = "max_position_embeddings + offset"
EXPERTS = "num_experts"
EXPERT_FFN = "moe_intermediate_size"
SHARED_FFN = "shared_expert_intermediate_size"
ONE = "1"

EACH = "{expert}"
"""Stands in a name for the number of an expert."""

Axis = str | tuple[str, ...]
"""One axis of a parameter; a tuple: several one after the other, as fused matrices have them."""
Axes = tuple[Axis, ...]
Table = Mapping[str, Axes]


@dataclass(frozen=True)
class Site:
    """A place where the residual stream is normalised and read."""

    norm: str
    """Module, relative to the layer, whose input is the stream."""
    readers: tuple[str, ...]
    """Modules, relative to the layer, that read the normalised stream."""
    block: str
    """Module, relative to the layer, whose output is added to the stream."""


@dataclass(frozen=True)
class Experts:
    """The sparse layers of a family: experts, of which a router sends each token to a few.

    `EACH` in a name stands for every expert.
    """

    number: tuple[str, ...]
    """Config keys that may hold the number of experts; of two the class takes the first."""
    layer: Table
    """Parameters of a sparse layer, in place of `Family.layer`."""
    site: Site
    """Where a sparse layer reads the stream last, in place of the last of `Family.sites`."""
    writers: tuple[str, ...]
    """Modules of that block that add to the stream, weighed by router and gate, in place of the
    last of `Family.writers`. A single regression does not fit them: they stay projected."""
    fused: Mapping[str, tuple[str, ...]]
    """The class's name to those on disk, where they differ, relative to the layer: with `EACH` in
    them, all experts' tensors on a first axis, several names one after the other on the next."""
    active: str = "num_experts_per_tok"
    """Config key of the number of experts that a token goes through."""


@dataclass(frozen=True)
class Family:
    """Everything sp3llm knows about one `model_type`."""

    model_type: str
    """The `model_type` of `config.json`."""
    architecture: str
    """The stock class, as `architectures` names it."""
    defaults: Mapping[str, Any]
    """Values that the stock config class supplies where `config.json` is silent."""
    embeddings: Table
    """Parameters before the layers."""
    layer: Table
    """Parameters of one layer without experts, relative to `layer_prefix`."""
    optional: Mapping[str, Table]
    """Further parameters of a layer, present where the config's flag is true."""
    sites: tuple[Site, ...]
    """Where a layer reads the stream, in order."""
    writers: tuple[str, ...]
    """Modules of a layer that add to the stream, in order."""
    final_norm: str = "model.norm"
    """The norm after the last layer, read by the head."""
    head: str = "lm_head"
    """The output head; with tied embeddings it has no parameter of its own."""
    layer_prefix: str = "model.layers.{layer}."
    """Prefix of layer parameters."""
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Buffers that old checkpoints carry and the class recomputes."""
    head_module: str = "lm_head"
    """The head's module, which in some families has another name than on disk."""
    keys: Mapping[str, str | None] = field(default_factory=dict)
    """Where the config names a size otherwise than Llama's: the key, or None if it has none."""
    centred: bool = False
    """The norms are LayerNorms: they remove the mean over channels first (DESIGN 3.4)."""
    norm_bias: bool = False
    """The norms have biases."""
    norm_offset: float = 0.0
    """What the class adds to a norm's stored weight."""
    eps: str | float = "rms_norm_eps"
    """The norms' epsilon, or the config key that holds it."""
    residual_multiplier: str | None = None
    """Config key of the factor on everything that is added to the stream."""
    scales_embeddings: bool = False
    """The class multiplies embeddings by the square root of the hidden size."""
    square: bool = False
    """The class demands `hidden_size = num_attention_heads * head_dim` (DESIGN 3.6)."""
    rotary: bool = True
    """Positions are rotated into queries and keys, which cannot be projected then."""
    projections: tuple[str, str] | None = None
    """Modules from the embedding width into the stream, and from the stream to it before the head;
    the class has them where the two widths differ (DESIGN 3.5)."""
    position_offset: int = 0
    """Rows of the table of learned positions before the first position's."""
    parallel: str | None = None
    """Config key that says whether a layer's blocks read the same stream and are added together."""
    experts: Experts | None = None
    """What sparse layers have instead; with it no FFN width is cut, nor the number of experts."""
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Config key to the only value that is supported, and why no other is."""

    @property
    def layers_module(self) -> str:
        """Module path of the list of layers."""
        return self.layer_prefix.partition(".{")[0]

    @property
    def embedding(self) -> str:
        """Name of the token embedding table."""
        return next(iter(self.embeddings))


@dataclass(frozen=True)
class Group:
    """Parameters that are read, transformed and written together."""

    name: str
    """`embeddings`, `layer 0`, ..., `head`."""
    parameters: Table = field(default_factory=dict)
    """Full name on disk to axes."""
    prefix: str = ""
    """What a full name begins with."""
    layer: int = -1
    """Which layer it is, if it is one."""
    sparse: bool = False
    """Whether it is a layer whose last block is one of experts."""
    sites: tuple[Site, ...] = ()
    """Where the layer reads the stream, in order."""
    writers: tuple[str, ...] = ()
    """Modules of the layer that add to the stream, in order; one a site, but for experts."""


_LLAMA_LAYER: dict[str, Axes] = {
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
_QKV_BIAS: dict[str, Axes] = {
    "self_attn.q_proj.bias": (QUERY,),
    "self_attn.k_proj.bias": (KEY_VALUE,),
    "self_attn.v_proj.bias": (KEY_VALUE,),
}
_ATTENTION_BIAS: dict[str, Axes] = {**_QKV_BIAS, "self_attn.o_proj.bias": (RESIDUAL,)}
_MLP_BIAS: dict[str, Axes] = {
    "mlp.gate_proj.bias": (FFN,),
    "mlp.up_proj.bias": (FFN,),
    "mlp.down_proj.bias": (RESIDUAL,),
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_LAYER_NORMS: dict[str, Axes] = {
    f"{norm}.{part}": (RESIDUAL,)
    for norm in ("input_layernorm", "post_attention_layernorm")
    for part in ("weight", "bias")
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        **_COMMON_DEFAULTS,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    embeddings={"model.embed_tokens.weight": (VOCAB, RESIDUAL)},
    layer=_LLAMA_LAYER,
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
        **_COMMON_DEFAULTS,
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
        **_COMMON_DEFAULTS,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    layer={**_LLAMA_LAYER, **_QKV_BIAS},
    optional={},
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    layer={
        **_LLAMA_LAYER,
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
    },
    optional={"attention_bias": _ATTENTION_BIAS},
)

GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        **_COMMON_DEFAULTS,
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
    defaults={**LLAMA.defaults, "residual_multiplier": 1.0},
    residual_multiplier="residual_multiplier",
)
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        **_COMMON_DEFAULTS,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
)
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        **_COMMON_DEFAULTS,
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
)
STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    defaults={
        **{k: v for k, v in _COMMON_DEFAULTS.items() if k != "rms_norm_eps"},
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
    layer={**_LLAMA_LAYER, **_LAYER_NORMS},
    optional={"use_qkv_bias": _QKV_BIAS},
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
OPT = Family(
    model_type="opt",
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
            **_QKV_BIAS,
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
        **_LAYER_NORMS,
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
            **_attention(_LLAMA_LAYER),
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
    defaults={
        **_COMMON_DEFAULTS,
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
    optional={"qkv_bias": _QKV_BIAS},
    experts=replace(
        QWEN3_MOE.experts,
        number=("num_experts",),
        layer={
            **_attention(_LLAMA_LAYER),
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

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GRANITE,
        SMOLLM3,
        PHI3,
        STABLELM,
        OPT,
        GPT_NEOX,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}

_POST_NORM = "its norms sit after the sublayer, on the stream, so no exact rotation exists"
REFUSED: Mapping[str, str] = {
    "gemma2": _POST_NORM,
    "gemma3": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises UserError, with the list of what is supported, for any other `model_type`, for a class
    that is not the family's causal language model, and for a quantized checkpoint.
    """
    model_type = config.get("model_type")
    supported = ", ".join(sorted(FAMILIES))
    if model_type in REFUSED:
        raise UserError(
            f"Model family '{model_type}' cannot be compressed into a stock model: "
            f"{REFUSED[model_type]}; supported families are {supported}."
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"Expected a model of a supported family ({supported}), found model_type "
            f"'{model_type}' in config.json: choose a model of a supported family."
        )
    family = FAMILIES[model_type]
    stated = config.get("architectures") or [family.architecture]
    architecture = stated[0] if isinstance(stated, list) else stated
    if architecture != family.architecture:
        raise UserError(
            f"Expected architecture {family.architecture}, found {architecture} in "
            "config.json: choose the causal language model of this family."
        )
    for key, (value, why) in family.unsupported.items():
        found = setting(family, config, key)
        if found != value:
            raise UserError(
                f"A {model_type} model with {key} = {json.dumps(found)} cannot be compressed: "
                f"{why}; choose another model."
            )
    if config.get("quantization_config"):
        details = config["quantization_config"]
        known = isinstance(details, dict) and details.get("quant_method")
        method = known or "by an unknown method"
        raise UserError(
            f"The checkpoint is quantized ({method}), and its weights cannot be rotated: load the "
            "unquantized checkpoint it was made from, and quantize the compressed model instead."
        )
    return family


def setting(family: Family, config: Mapping[str, Any], key: str) -> Any:
    """A config value, or the family's default where `config.json` is silent or null."""
    key = family.keys.get(key, key)
    value = config.get(key)
    return family.defaults.get(key) if value is None else value


def norm_eps(family: Family, config: Mapping[str, Any]) -> float:
    """The norms' epsilon."""
    is_key = isinstance(family.eps, str)
    return setting(family, config, family.eps) if is_key else family.eps


def residual_multiplier(family: Family, config: Mapping[str, Any]) -> float:
    """The factor on what writers add to the stream."""
    key = family.residual_multiplier
    return setting(family, config, key) if key else 1.0


def is_parallel(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a layer's blocks read the same stream and are added together."""
    return bool(family.parallel and setting(family, config, family.parallel))


def is_square(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether `hidden_size` must stay `num_attention_heads * head_dim`.

    Some classes derive one from the other; Phi-3's check of its longrope factors does.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_long = (rope.get("rope_type") or rope.get("type")) in ("longrope", "su", "yarn")
    return family.square or (family.model_type == "phi3" and is_long)


def embedding_scale(family: Family, hidden_size: int) -> float:
    """What the class multiplies embeddings by before the stream."""
    return math.sqrt(hidden_size) if family.scales_embeddings else 1.0


def key_value_heads(family: Family, config: Mapping[str, Any]) -> int:
    """Number of KV groups: null means as many as there are heads, absence the class default."""
    key = family.keys.get("num_key_value_heads", "num_key_value_heads")
    stated = config.get(key, family.defaults.get(key)) if key else None
    return stated or setting(family, config, "num_attention_heads")


def expert_counts(family: Family, config: Mapping[str, Any]) -> tuple[int, int]:
    """Number of experts of a sparse layer, and of those that a token goes through; or zeros."""
    if family.experts is None:
        return 0, 0
    stated = [config[key] for key in family.experts.number if config.get(key) is not None]
    defaults = [family.defaults[key] for key in family.experts.number if key in family.defaults]
    return (stated or defaults)[0], setting(family, config, family.experts.active)


def is_sparse(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts: all have, but for those that Qwen's configs except."""
    number, _ = expert_counts(family, config)
    excepted = setting(family, config, "mlp_only_layers") or ()
    step = setting(family, config, "decoder_sparse_step") or 1
    return number > 0 and layer not in excepted and (layer + 1) % step == 0


def axis_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Length of every axis."""
    heads = setting(family, config, "num_attention_heads")
    hidden_size = setting(family, config, "hidden_size")
    head_dim = setting(family, config, "head_dim") or hidden_size // heads
    return {
        RESIDUAL: hidden_size,
        FFN: setting(family, config, "intermediate_size"),
        QUERY: heads * head_dim,
        KEY_VALUE: key_value_heads(family, config) * head_dim,
        INTERLEAVED: heads * 3 * head_dim,
        HEAD_DIM: head_dim,
        VOCAB: setting(family, config, "vocab_size"),
        EMBEDDING: setting(family, config, "word_embed_proj_dim") or hidden_size,
        POSITIONS: setting(family, config, "max_position_embeddings") + family.position_offset,
        EXPERTS: expert_counts(family, config)[0],
        EXPERT_FFN: setting(family, config, "moe_intermediate_size") or 0,
        SHARED_FFN: setting(family, config, "shared_expert_intermediate_size") or 0,
        ONE: 1,
    }


def axis_size(sizes: Mapping[str, int], axis: Axis) -> int:
    """Length of an axis, fused ones included."""
    return sizes[axis] if isinstance(axis, str) else sum(sizes[part] for part in axis)


def window_length(family: Family, config: Mapping[str, Any], asked: int | None) -> int:
    """Tokens a window: as asked, or 2048, or the model's positions if fewer.

    Raises UserError if more are asked for than the model has positions.
    """
    positions = setting(family, config, "max_position_embeddings")
    if asked is not None and asked > positions:
        raise UserError(
            f"Expected --seq-len of at most {positions}, the model's positions, found {asked}: "
            "give a smaller one."
        )
    return asked or min(2048, positions)


def is_tied(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding table."""
    return bool(setting(family, config, "tie_word_embeddings"))


def has_projections(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether embeddings have a width of their own."""
    sizes = axis_sizes(family, config)
    return family.projections is not None and sizes[EMBEDDING] != sizes[RESIDUAL]


def groups(family: Family, config: Mapping[str, Any]) -> list[Group]:
    """All parameters on disk in the order the stream meets them: embeddings, layers, head."""
    embeddings, head = dict(family.embeddings), {f"{family.final_norm}.weight": (RESIDUAL,)}
    if family.norm_bias:
        head[f"{family.final_norm}.bias"] = (RESIDUAL,)
    if has_projections(family, config):
        into, out = family.projections
        embeddings[f"{into}.weight"] = (RESIDUAL, EMBEDDING)
        head[f"{out}.weight"] = (EMBEDDING, RESIDUAL)
    if not is_tied(family, config):
        head[f"{family.head}.weight"] = (VOCAB, EMBEDDING if family.projections else RESIDUAL)
    found = [Group("embeddings", embeddings)]
    number, _ = expert_counts(family, config)
    tables = [_expanded(_layer_table(family, config, sparse), number) for sparse in (False, True)]
    sites, writers = [family.sites] * 2, [family.writers] * 2
    if family.experts is not None:
        site = family.experts.site
        site = replace(site, readers=tuple(_expanded(dict.fromkeys(site.readers, ()), number)))
        sites[True] = (*family.sites[:-1], site)
        last = _expanded(dict.fromkeys(family.experts.writers, ()), number)
        writers[True] = (*family.writers[:-1], *last)
    for index in range(setting(family, config, "num_hidden_layers")):
        prefix, sparse = family.layer_prefix.format(layer=index), is_sparse(family, config, index)
        table = {prefix + name: axes for name, axes in tables[sparse].items()}
        found.append(
            Group(f"layer {index}", table, prefix, index, sparse, sites[sparse], writers[sparse])
        )
    found.append(Group("head", head))
    return found


def _layer_table(family: Family, config: Mapping[str, Any], sparse: bool) -> dict[str, Axes]:
    """Parameters of one layer, an `EACH` in names for all experts."""
    layer = dict(family.experts.layer if sparse and family.experts else family.layer)
    for flag, table in family.optional.items():
        if setting(family, config, flag):
            layer.update(table)
    return layer


def _expanded(table: Table, experts: int) -> dict[str, Axes]:
    """A table with the names of every expert."""
    found: dict[str, Axes] = {}
    for name, axes in table.items():
        numbers = range(experts) if EACH in name else range(1)
        found.update({name.replace(EACH, str(number)): axes for number in numbers})
    return found


def parameter_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter on disk, tied weights once."""
    sizes = axis_sizes(family, config)
    return {
        name: tuple(axis_size(sizes, axis) for axis in axes)
        for group in groups(family, config)
        for name, axes in group.parameters.items()
    }


def count_parameters(family: Family, config: Mapping[str, Any]) -> int:
    """True number of parameters, tied weights once."""
    experts, _ = expert_counts(family, config)
    return _count(family, config, experts, matrices_only=False)


def count_parts(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """True number of parameters of every part of a model, tied weights once: `embeddings`,
    `attention`, `FFN` (`experts`, router and shared expert among them), `norms` and `head`.

    Projections around the embeddings and learned positions count as embeddings.
    """
    parts = dict.fromkeys(("embeddings", "attention", "FFN", "norms", "head"), 0)
    shapes = parameter_shapes(family, config)
    for group in groups(family, config):
        norms = {f"{group.prefix}{site.norm}" for site in group.sites} | {family.final_norm}
        attention = f"{group.prefix}{family.sites[0].block}."
        for name in group.parameters:
            module = name.rpartition(".")[0]
            if module in norms:
                part = "norms"
            elif not group.prefix:
                part = "head" if module == family.head else "embeddings"
            else:
                part = "attention" if name.startswith(attention) else "FFN"
            parts[part] += math.prod(shapes[name])
    return parts


def count_matrix_parameters(family: Family, config: Mapping[str, Any]) -> int:
    """Those in matrices that a token meets, the embedding table included.

    Of a sparse layer these are the router's, the experts' that a token goes through, and a shared
    expert's with its gate.
    """
    _, active = expert_counts(family, config)
    return _count(family, config, active, matrices_only=True)


def count_largest_layer(family: Family, config: Mapping[str, Any]) -> int:
    """True number of parameters of the layer that has most."""
    experts, _ = expert_counts(family, config)
    kinds = {is_sparse(family, config, n) for n in range(_layers(family, config))}
    tables = [_layer_table(family, config, sparse) for sparse in kinds]
    return max(_size(family, config, table, experts, matrices_only=False) for table in tables)


def _layers(family: Family, config: Mapping[str, Any]) -> int:
    return setting(family, config, "num_hidden_layers")


def _count(family: Family, config: Mapping[str, Any], experts: int, matrices_only: bool) -> int:
    # Layers are of two kinds at most: one of each is counted, and one expert of all, so that a
    # plan can count hundreds of shapes in a second.
    layers = _layers(family, config)
    sparse = sum(is_sparse(family, config, index) for index in range(layers))
    tables = [(group.parameters, 1) for group in groups(family, {**config, "num_hidden_layers": 0})]
    tables += [(_layer_table(family, config, False), layers - sparse)]
    tables += [(_layer_table(family, config, True), sparse)]
    return sum(
        repeats * _size(family, config, table, experts, matrices_only) for table, repeats in tables
    )


def _size(
    family: Family, config: Mapping[str, Any], table: Table, experts: int, matrices_only: bool
) -> int:
    """Number of parameters of a table, those of `experts` experts among them."""
    sizes = axis_sizes(family, config)
    return sum(
        (experts if EACH in name else 1) * math.prod(axis_size(sizes, axis) for axis in axes)
        for name, axes in table.items()
        if len(axes) == 2 or not matrices_only
    )
