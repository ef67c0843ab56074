"""Model families as data: which parameter lives on which axes, who reads and writes the stream.

Fold, rotate, cut, count and validate are generic loops over these tables. Matching is by
`config.model_type` and exact: a family that is not here is refused, never approximated.

Names are those on disk. A parameter's axes are given in the order of its shape.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sp3llm.errors import UserError

RESIDUAL = "hidden_size"
FFN = "intermediate_size"
QUERY = "num_attention_heads * head_dim"
KEY_VALUE = "num_key_value_heads * head_dim"
HEAD_DIM = "head_dim"
VOCAB = "vocab_size"

Axes = tuple[str, ...]
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
    """Parameters of one layer, relative to `layer_prefix`."""
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

FAMILIES: Mapping[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)}

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
    value = config.get(key)
    return family.defaults.get(key) if value is None else value


def key_value_heads(family: Family, config: Mapping[str, Any]) -> int:
    """Number of KV groups: null means as many as there are heads, absence the class default."""
    stated = config.get("num_key_value_heads", family.defaults["num_key_value_heads"])
    return stated or setting(family, config, "num_attention_heads")


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
        HEAD_DIM: head_dim,
        VOCAB: setting(family, config, "vocab_size"),
    }


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


def groups(family: Family, config: Mapping[str, Any]) -> list[Group]:
    """All parameters on disk in the order the stream meets them: embeddings, layers, head."""
    layer = dict(family.layer)
    for flag, table in family.optional.items():
        if setting(family, config, flag):
            layer.update(table)
    head: dict[str, Axes] = {f"{family.final_norm}.weight": (RESIDUAL,)}
    if not is_tied(family, config):
        head[f"{family.head}.weight"] = (VOCAB, RESIDUAL)
    found = [Group("embeddings", family.embeddings)]
    for index in range(setting(family, config, "num_hidden_layers")):
        prefix = family.layer_prefix.format(layer=index)
        table = {prefix + name: axes for name, axes in layer.items()}
        found.append(Group(f"layer {index}", table, prefix))
    found.append(Group("head", head))
    return found


def parameter_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter on disk, tied weights once."""
    sizes = axis_sizes(family, config)
    return {
        name: tuple(sizes[axis] for axis in axes)
        for group in groups(family, config)
        for name, axes in group.parameters.items()
    }


def count_parameters(family: Family, config: Mapping[str, Any]) -> int:
    """True number of parameters, tied weights once."""
    return _count(family, config, matrices_only=False)


def count_matrix_parameters(family: Family, config: Mapping[str, Any]) -> int:
    """Those in matrices, the embedding table included."""
    return _count(family, config, matrices_only=True)


def _count(family: Family, config: Mapping[str, Any], matrices_only: bool) -> int:
    # Layers are alike: one is counted, so that a plan can count hundreds of shapes in a second.
    layers = setting(family, config, "num_hidden_layers")
    one_layer = {**config, "num_hidden_layers": 1}
    sizes = axis_sizes(family, config)
    total = 0
    for group in groups(family, one_layer):
        repeats = layers if group.prefix else 1
        for axes in group.parameters.values():
            if len(axes) == 2 or not matrices_only:
                total += repeats * math.prod(sizes[axis] for axis in axes)
    return total
