"""Neurons and KV groups: which stay, gating and cutting them and all that goes with them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sp3llm.compression.projection import KeptUnits
from sp3llm.compression.statistics import Moments
from sp3llm.maths.unit_selection import unit_members
from sp3llm.models.families import Axis, Family, Group


def kept_neurons(
    moments: Moments, neurons: int, keep: int, in_trials: bool = False
) -> Tensor | None:
    """Which of the FFN's `neurons` stay where `keep` do, by the pass over the dense model,
    `(L, neurons)`, boolean; None: all, or it was not asked. `in_trials`, what tells there what
    shapes lose has not chosen them.
    """
    if keep == neurons or moments.dropped_OLG is None:
        return None
    dropped_LG = moments.dropped_OLG[-1 if in_trials else 0, :, : neurons - keep]
    stays_LF = dropped_LG.new_ones(len(dropped_LG), neurons, dtype=torch.bool)
    return stays_LF.scatter_(1, dropped_LG, False)


def gate_writers(
    family: Family, group: Group, tensors: Mapping[str, Tensor], kept_units: KeptUnits | None
) -> dict[str, Tensor]:
    """A layer's tensors with the gates of a learned mask folded into its writers' columns."""
    gated = dict(tensors)
    for writer, axis in gated_writers(family, group):
        gates_LU = None if kept_units is None else kept_units.gates(axis)
        name = f"{group.prefix}{writer}.weight"
        if gates_LU is not None:
            gates_U = gates_LU[group.layer]
            gates_P = gates_U.repeat_interleave(tensors[name].shape[1] // len(gates_U))
            gated[name] = tensors[name].to(gates_P) * gates_P
    return gated


def gated_writers(family: Family, group: Group) -> list[tuple[str, str]]:
    """Writers of a layer whose inputs a mask may cut, with the axis that they read; a block of
    experts has none.
    """
    if not group.prefix:
        return []
    count = len(family.writers) - group.sparse
    return [(writer, family.layer[f"{writer}.weight"][1]) for writer in family.writers[:count]]


def cut_units(
    group: Group,
    tensors: Mapping[str, Tensor],
    kept_U: Tensor,
    units: Mapping[str, int],
    sizes: Mapping[str, int],
) -> dict[str, Tensor]:
    """A layer's tensors with some units only, `kept_U` by number.

    `units` has the length of one unit along every axis that is cut, `sizes` the length of every
    axis before.
    """
    remaining = dict(tensors)
    for name, axes in group.parameters.items():
        for dim, axis in enumerate(axes):
            rows = kept_rows(axis, kept_U, units, sizes)
            if rows is not None and name in remaining:
                tensor = remaining[name]
                remaining[name] = tensor.index_select(dim, rows.to(tensor.device))
    return remaining


def kept_rows(
    axis: Axis, kept_U: Tensor, cut_axes: Mapping[str, int], sizes: Mapping[str, int]
) -> Tensor | None:
    """Indices along an axis that belong to the kept units; None: all, since it is not cut.

    An axis may be several in a row, as fused matrices have it. `cut_axes` has the length of one
    unit along every axis that is cut, `sizes` the length of every axis before.
    """
    parts = (axis,) if isinstance(axis, str) else axis
    if not any(part in cut_axes for part in parts):
        return None
    rows, start = [], 0
    for part in parts:
        size = cut_axes.get(part)
        if size is None:
            rows.append(start + torch.arange(sizes[part], device=kept_U.device))
        else:
            rows.append(start + unit_members(kept_U, size))
        start += sizes[part]
    return torch.cat(rows)


def complement(units_U: Tensor, count: int) -> Tensor:
    """Numbers below `count` that are not among those given, rising."""
    is_left = torch.ones(count, dtype=torch.bool, device=units_U.device)
    is_left[units_U] = False
    return is_left.nonzero()[:, 0]
