"""Sizes and parameters of a model, from its family's table and its `config.json`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sp3llm.models.families.schema import (
    EACH,
    EMBEDDING,
    EXPERT_FFN,
    EXPERTS,
    FFN,
    HEAD_DIM,
    INTERLEAVED,
    KEY_VALUE,
    LABELS,
    ONE,
    POSITIONS,
    QUERY,
    RESIDUAL,
    SHARED_FFN,
    TYPES,
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
    """The factor on what the writers add to the residual stream; 1 where the family has none."""
    key = family.residual_multiplier
    return setting(family, config, key) if key else 1.0


def logit_divisor(family: Family, config: Mapping[str, Any]) -> float:
    """What the class divides its logits by; 1 where it does not."""
    key = family.logit_divisor
    return setting(family, config, key) if key else 1.0


def is_parallel(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether attention and FFN of a layer read the same stream and are added together."""
    return bool(family.parallel and setting(family, config, family.parallel))


def is_square(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether `hidden_size` must stay `num_attention_heads * head_dim`, since the class derives one
    from the other: always (`Family.square`), or with the RoPE that the config asks for.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, Mapping) else {}  # the class refuses anything else
    rope_type = rope.get("rope_type") or rope.get("type")  # the second is how old files say it
    return family.square or rope_type in family.square_rope_types


def embedding_scale(family: Family, hidden_size: int) -> float:
    """The factor that the class puts on embeddings before the first layer; mostly 1."""
    return math.sqrt(hidden_size) if family.scales_embeddings else 1.0


def key_value_heads(family: Family, config: Mapping[str, Any]) -> int:
    """Number of key-value heads, that is of groups of query heads that share one.

    null in `config.json` means as many as there are query heads, absence the class's default.
    """
    key = family.keys.get("num_key_value_heads", "num_key_value_heads")
    stated = config.get(key, family.defaults.get(key)) if key else None
    return stated or setting(family, config, "num_attention_heads")


def expert_counts(family: Family, config: Mapping[str, Any]) -> tuple[int, int]:
    """Number of experts of a sparse layer, and how many of them a token goes through.

    Both are 0 in a family without experts.
    """
    if family.experts is None:
        return 0, 0
    stated = [config[key] for key in family.experts.number if config.get(key) is not None]
    defaults = [family.defaults[key] for key in family.experts.number if key in family.defaults]
    return (stated or defaults)[0], setting(family, config, family.experts.active)


def is_sparse(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Whether the layer of that index has experts."""
    experts = family.experts
    if experts is None or expert_counts(family, config)[0] == 0:
        return False
    dense = (setting(family, config, experts.dense_layers) if experts.dense_layers else None) or ()
    step = (setting(family, config, experts.sparse_step) if experts.sparse_step else None) or 1
    return layer not in dense and (layer + 1) % step == 0


def axis_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Length of every axis that a parameter may lie on, by the axis' name.

    Fused axes are not among them: `axis_size` adds up their parts. Sizes that the family does not
    have are 0.
    """
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
        TYPES: setting(family, config, "type_vocab_size") or 0,
        LABELS: _labels(config),
        ONE: 1,
    }


def _labels(config: Mapping[str, Any]) -> int:
    """Number of labels that a task's head gives values of; the config class goes by their names."""
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) else config.get("num_labels") or 2


def axis_size(sizes: Mapping[str, int], axis: Axis) -> int:
    """Length of an axis, from `axis_sizes`; of a fused one the sum of its parts."""
    return sizes[axis] if isinstance(axis, str) else sum(sizes[part] for part in axis)


def is_tied(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding table."""
    return family.task_head is None and bool(setting(family, config, "tie_word_embeddings"))


def has_projections(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the embedding table has another width than the residual stream."""
    sizes = axis_sizes(family, config)
    return family.projections is not None and sizes[EMBEDDING] != sizes[RESIDUAL]


def groups(family: Family, config: Mapping[str, Any]) -> list[Group]:
    """All parameters on disk in the order a forward pass needs them: embeddings, layers, head."""
    return [
        Group("embeddings", _embedding_table(family, config)),
        *_layer_groups(family, config),
        Group("head", _head_table(family, config)),
    ]


def _embedding_table(family: Family, config: Mapping[str, Any]) -> dict[str, Axes]:
    """Parameters before the layers."""
    table = dict(family.embeddings)
    if has_projections(family, config):
        into_stream, _ = family.projections
        table[f"{into_stream}.weight"] = (RESIDUAL, EMBEDDING)
    return table


def _head_table(family: Family, config: Mapping[str, Any]) -> dict[str, Axes]:
    """Parameters behind the layers; a tied head has none of its own."""
    if family.task_head is not None:
        return dict(family.ending)
    table: dict[str, Axes] = {f"{family.final_norm}.weight": (RESIDUAL,)}
    if family.norm_bias:
        table[f"{family.final_norm}.bias"] = (RESIDUAL,)
    if has_projections(family, config):
        _, out_of_stream = family.projections
        table[f"{out_of_stream}.weight"] = (EMBEDDING, RESIDUAL)
    if not is_tied(family, config):
        table[f"{family.head}.weight"] = (VOCAB, EMBEDDING if family.projections else RESIDUAL)
    return table


def _layer_groups(family: Family, config: Mapping[str, Any]) -> Iterator[Group]:
    """The layers in order, each a group."""
    number, _ = expert_counts(family, config)
    # Layers are of two kinds at most, so that names need not be made anew for each.
    dense = Group(
        "",
        layer_table(family, config, sparse=False),
        sites=family.sites,
        writers=family.writers,
    )
    sparse = dense
    if family.experts is not None:
        site = family.experts.site
        sparse = Group(
            "",
            _expanded(layer_table(family, config, sparse=True), number),
            sparse=True,
            sites=(*family.sites[:-1], replace(site, readers=_of_each(site.readers, number))),
            writers=(*family.writers[:-1], *_of_each(family.experts.writers, number)),
        )
    for index in range(setting(family, config, "num_hidden_layers")):
        kind = sparse if is_sparse(family, config, index) else dense
        prefix = family.layer_prefix.format(layer=index)
        yield replace(
            kind,
            name=f"layer {index}",
            parameters={prefix + name: axes for name, axes in kind.parameters.items()},
            prefix=prefix,
            layer=index,
        )


def layer_table(family: Family, config: Mapping[str, Any], sparse: bool) -> dict[str, Axes]:
    """Parameters of a layer that is `sparse` or not, relative to its prefix; a name with `EACH` in
    it stands for those of all experts.
    """
    layer = dict(family.experts.layer if sparse and family.experts else family.layer)
    for flag, table in family.optional.items():
        if setting(family, config, flag):
            layer.update(table)
    return layer


def _expanded(table: Table, experts: int) -> dict[str, Axes]:
    """The table with every expert's name where one name stood for all."""
    return {
        expanded: axes for name, axes in table.items() for expanded in _of_each([name], experts)
    }


def _of_each(names: Sequence[str], experts: int) -> tuple[str, ...]:
    """The names, those with `EACH` in them once for every expert."""
    return tuple(
        name.replace(EACH, str(number))
        for name in names
        for number in (range(experts) if EACH in name else range(1))
    )


def renumbered(family: Family, group: Group, layer: int) -> Group:
    """The group of a layer as one of another number has it; other groups as they are."""
    if not group.prefix or layer == group.layer:
        return group
    prefix = family.layer_prefix.format(layer=layer)
    parameters = {
        prefix + name.removeprefix(group.prefix): axes for name, axes in group.parameters.items()
    }
    return replace(group, name=f"layer {layer}", parameters=parameters, prefix=prefix, layer=layer)


def parameter_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter on disk, tied weights once."""
    sizes = axis_sizes(family, config)
    return {
        name: tuple(axis_size(sizes, axis) for axis in axes)
        for group in groups(family, config)
        for name, axes in group.parameters.items()
    }
