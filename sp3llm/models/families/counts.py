"""True parameter counts, tied weights once."""

import math
from collections.abc import Mapping
from typing import Any

from sp3llm.models.families.schema import (
    EACH,
    EXPERTS,
    Family,
    Table,
)
from sp3llm.models.families.sizes import (
    axis_size,
    axis_sizes,
    expert_counts,
    groups,
    is_sparse,
    layer_table,
    parameter_shapes,
    setting,
)


def count_parameters(family: Family, config: Mapping[str, Any]) -> int:
    """Number of parameters; tied weights and tables count once."""
    experts, _ = expert_counts(family, config)
    return _count(family, config, experts, matrices_only=False)


def count_parts(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters of every part of a model, tied weights once: `embeddings`,
    `attention`, `FFN` (experts, router and shared expert among them), `norms` and `head`.

    Projections around the embeddings and learned positions count as embeddings.
    """
    parts = dict.fromkeys(("embeddings", "attention", "FFN", "norms", "head"), 0)
    shapes = parameter_shapes(family, config)
    for group in groups(family, config):
        norms = {f"{group.prefix}{site.norm}" for site in group.sites}
        norms |= {family.final_norm, family.embedding_norm}
        attention = f"{group.prefix}{family.sites[0].block.partition('.')[0]}."
        for name in group.parameters:
            module = name.rpartition(".")[0]
            if module in norms:
                part = "norms"
            elif not group.prefix:
                is_head = module == family.head or name in family.ending
                part = "head" if is_head else "embeddings"
            else:
                part = "attention" if name.startswith(attention) else "FFN"
            parts[part] += math.prod(shapes[name])
    return parts


def count_matrix_parameters(family: Family, config: Mapping[str, Any]) -> int:
    """Number of parameters in the matrices that one token is multiplied by or looked up in: norms
    and biases are left out, the embedding table is counted.

    Of a sparse layer these are the router, as many experts as a token goes through, and a shared
    expert with its gate.
    """
    _, active = expert_counts(family, config)
    return _count(family, config, active, matrices_only=True)


def count_layer_matrices(family: Family, config: Mapping[str, Any]) -> int:
    """Number of parameters in the matrices of all layers: what papers on BERT count as the encoder,
    `L (4 D^2 + 2 D F)`.
    """
    layer = layer_table(family, config, sparse=False)
    return _layers(family, config) * _size(family, config, layer, 0, matrices_only=True)


def count_largest_layer(family: Family, config: Mapping[str, Any]) -> int:
    """Number of parameters of the layer that has most."""
    experts, _ = expert_counts(family, config)
    kinds = {is_sparse(family, config, n) for n in range(_layers(family, config))}
    tables = [layer_table(family, config, sparse) for sparse in kinds]
    return max(_size(family, config, table, experts, matrices_only=False) for table in tables)


def _layers(family: Family, config: Mapping[str, Any]) -> int:
    return setting(family, config, "num_hidden_layers")


def _count(family: Family, config: Mapping[str, Any], experts: int, matrices_only: bool) -> int:
    # Layers are of two kinds at most: one of each is counted, and one expert of all, so that a
    # plan can count hundreds of shapes in a second.
    layers = _layers(family, config)
    layers_key = family.keys.get("num_hidden_layers", "num_hidden_layers")
    sparse = sum(is_sparse(family, config, index) for index in range(layers))
    tables = [(group.parameters, 1) for group in groups(family, {**config, layers_key: 0})]
    tables += [(layer_table(family, config, False), layers - sparse)]
    tables += [(layer_table(family, config, True), sparse)]
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


def linear_modules(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Modules that are `nn.Linear` in the stock class, but for the head, with their weights' shapes
    `(out, in)`; in the order of a forward pass.

    Experts and their routers are not among them: in the class they are bare parameters.
    """
    not_linear = {*family.embeddings, f"{family.head}.weight"}
    in_layers = [_linear_names(layer_table(family, config, sparse)) for sparse in (False, True)]
    names: list[str] = []
    for group in groups(family, config):
        if group.layer >= 0:
            names += [group.prefix + name for name in in_layers[group.sparse]]
        else:
            names += [name for name in _linear_names(group.parameters) if name not in not_linear]
    shapes = parameter_shapes(family, config)
    return {name.removesuffix(".weight"): shapes[name] for name in names}


def _linear_names(table: Table) -> list[str]:
    """Of a table the matrices that are neither an expert's nor a router's."""
    return [
        name
        for name, axes in table.items()
        if len(axes) == 2 and EACH not in name and EXPERTS not in axes
    ]
