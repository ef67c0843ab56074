"""Fold, rotate and cut groups of parameters, prefetched and rounded for the export."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sp3llm.compression.attention import cut_attention
from sp3llm.compression.post_norm import project_post_norm
from sp3llm.compression.projection import Projection, project_group
from sp3llm.compression.refitter import FinishedGroup
from sp3llm.compression.units import cut_units, gate_writers, gated_writers
from sp3llm.errors import UserError
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import VOCAB, Family, Group
from sp3llm.models.shapes import Shape
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.prefetch import prefetch

# Entries of a vocabulary's table that are transformed at once, in float64.
_TABLE_PIECE = 2**23


def plain_groups(
    dense: Checkpoint,
    family: Family,
    projection: Projection,
    dtype: torch.dtype,
    execution: Execution,
    start: int = 0,
    layers: Sequence[int] | None = None,
) -> Iterator[FinishedGroup]:
    """Fold, rotate and cut every group of the small model from number `start` on, and nothing else.

    `layers` are the numbers of the dense layers that stay, rising; None: all.
    """
    groups = families.groups(family, dense.config)
    kept = [groups[number] for number in kept_groups(groups, layers)[start:]]
    sources = prefetch_groups(dense, family, kept, execution.device)
    for index, (group, source) in enumerate(sources, start):
        cut = gate_and_cut(family, projection, execution.device, group, source)
        tensors = project_and_round(family, projection, dtype, execution.device, group, cut)
        tensors = _without_masked_units(dense, family, projection, group, tensors)
        small = families.renumbered(family, group, index - 1)
        yield FinishedGroup(index, small, renamed(tensors, group, small))


def kept_groups(groups: Sequence[Group], layers: Sequence[int] | None) -> list[int]:
    """Of all groups of a model the numbers of those that stay with some of its layers only; None:
    all.
    """
    inner = range(len(groups) - 2) if layers is None else layers
    return [0, *(layer + 1 for layer in inner), len(groups) - 1]


def renamed(tensors: Mapping[str, Tensor], group: Group, small: Group) -> dict[str, Tensor]:
    """A group's tensors by the names that it has among the small model's groups."""
    return {small.prefix + name.removeprefix(group.prefix): t for name, t in tensors.items()}


def whole_groups(
    dense: Checkpoint, family: Family, dtype: torch.dtype, start: int = 0
) -> Iterator[FinishedGroup]:
    """Every group from number `start` on as it is, rounded."""
    groups = families.groups(family, dense.config)[start:]
    device = torch.device("cpu")
    for index, (group, source) in enumerate(
        prefetch(groups, lambda group: dense.read(group.parameters), device), start
    ):
        tensors = {name: rounded(name, tensor, dtype) for name, tensor in source.items()}
        yield FinishedGroup(index, group, tensors)


def _without_masked_units(
    dense: Checkpoint,
    family: Family,
    projection: Projection,
    group: Group,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The layer without the units that a learned mask drops; the refit cuts them away by itself."""
    sizes = families.axis_sizes(family, dense.config)
    for _, axis in gated_writers(family, group) if projection.kept_units else ():
        kept_U = projection.kept_units.kept(axis, group.layer)
        is_cut_already = axis == families.QUERY and projection.attention_cut is not None
        if kept_U is not None and not is_cut_already:
            units = unit_sizes(Shape.of(family, dense.config), axis)
            tensors = cut_units(group, tensors, kept_U, units, sizes)
    return tensors


def unit_sizes(dense: Shape, axis: str) -> dict[str, int]:
    """Length of a unit along every axis that goes with it."""
    if axis == families.FFN:
        return {families.FFN: 1}
    unit = dense.num_attention_heads // dense.num_key_value_heads * dense.head_dim
    return {families.QUERY: unit, families.KEY_VALUE: dense.head_dim}


def prefetch_groups(
    dense: Checkpoint, family: Family, groups: list[Group], device: torch.device
) -> Iterator[tuple[Group, Mapping[str, Tensor]]]:
    """Groups with their dense tensors, read ahead; the head with a tied table under its name."""

    def load(group: Group) -> Mapping[str, Tensor]:
        if group.name == "head":
            return head_tensors(dense, family)
        return dense.read(group.parameters)

    return prefetch(groups, load, device)


def gate_and_cut(
    family: Family,
    projection: Projection,
    device: torch.device,
    group: Group,
    source: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """A group as it is to be projected, still in the coordinates of the dense stream: a layer with
    a learned mask's gates folded in and its attention cut, on `device`; others as they are.
    """
    if not group.prefix:
        return source
    tensors = {name: tensor.to(device) for name, tensor in source.items()}
    tensors = gate_writers(family, group, tensors, projection.kept_units)
    return cut_attention(family, group, tensors, projection)


def project_and_round(
    family: Family,
    projection: Projection,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    cut: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A group, as `gate_and_cut` leaves it, in the small model's coordinates, rounded to the dtype
    of the export.
    """
    pieces: dict[str, list[Tensor]] = {}
    for piece in vocabulary_pieces(family, projection, group, cut):
        tensors = {name: tensor.to(device) for name, tensor in piece.items()}
        project = project_post_norm if family.post_norm else project_group
        for name, tensor in project(family, group, tensors, projection).items():
            if not pieces.get(name) or _in_rows(family, group, name):
                pieces.setdefault(name, []).append(rounded(name, tensor, dtype))
    return {name: torch.cat(p) if len(p) > 1 else p[0] for name, p in pieces.items()}


def _in_rows(family: Family, group: Group, name: str) -> bool:
    """Whether a tensor has a row for every token of the vocabulary."""
    is_head = group.name == "head" and name == f"{family.head}.weight"
    return is_head or group.parameters.get(name, ("",))[0] == VOCAB


def vocabulary_pieces(
    family: Family, projection: Projection, group: Group, source: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """A group's tensors with the rows of a vocabulary's table a few at a time, where every row is
    transformed by itself: in float64 a whole table is larger than any layer.
    """
    tables = [name for name in source if _in_rows(family, group, name)]
    as_whole = projection.embedding_EJ is not None or projection.tied_scale_K is not None
    if not tables or (group.name == "head" and as_whole):
        yield source
        return
    rows, width = source[tables[0]].shape
    step = max(1, _TABLE_PIECE // width)
    for start in range(0, rows, step):
        yield {**source, **{name: source[name][start : start + step] for name in tables}}


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the dtype of the export.

    Raises UserError if a value does not fit it.
    """
    result = value.to(dtype)
    if not torch.isfinite(result).all():
        raise UserError(
            f"Tensor '{name}' of the compressed model does not fit {dtype}: use a --dtype of "
            "wider range, or look for extreme values in the checkpoint."
        )
    return result
