"""Sizes and parameters of a model, from its family's table and its `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families.schema import (
    EACH,
    EMBEDDING,
    EXPERT_FFN,
    EXPERTS,
    FFN,
    HEAD_DIM,
    INTERLEAVED,
    KEY_VALUE,
    ONE,
    POSITIONS,
    QUERY,
    RESIDUAL,
    SHARED_FFN,
    VOCAB,
    Axes,
    Axis,
    Family,
    Group,
    Table,
)


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
    tables = [_expanded(layer_table(family, config, sparse), number) for sparse in (False, True)]
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


def layer_table(family: Family, config: Mapping[str, Any], sparse: bool) -> dict[str, Axes]:
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
