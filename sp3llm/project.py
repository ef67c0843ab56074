"""Fold, rotate, cut: one group of parameters from the old coordinates into the new ones.

With `T` (`D x K`, old to new) and `c = sqrt(K / D)` the new stream is `x' = c x T`; its mean
square equals the old one's where the stream lies in the span of `T`, so the norm's epsilon stays
(DESIGN 3.3). Embeddings become `c E T`, writers `c T^T W`, readers `W diag(g) T / c`, and the
norm weights 1: the constant sits in the readers, where rounding does not hit all channels alike.

Under LayerNorm `T = Z U^T` makes the new stream free of a mean (DESIGN 3.4): there is nothing to
centre, and the direction `1_K` that no stream uses carries constants to readers without a bias.

Everything is computed in float64; the caller rounds once, when it writes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp3llm.families import (
    FFN,
    INTERLEAVED,
    KEY_VALUE,
    QUERY,
    Axis,
    Family,
    Group,
    embedding_scale,
)
from sp3llm.heads import (
    join_writer,
    project_heads,
    query_key_projection,
    split_writer,
    value_output_projection,
)


@dataclass(frozen=True)
class HeadMoments:
    """What one layer's attention sees, head by head; float64."""

    output_HEE: Tensor
    """Covariance of what each head gives the writer."""
    mean_HE: Tensor
    """Its mean."""
    query_HEE: Tensor | None = None
    """Second moments of queries, biases included; None under rotary embedding."""
    key_HEE: Tensor | None = None
    """Covariances of keys."""

    def to(self, device: torch.device) -> "HeadMoments":
        """The same on another device."""
        return HeadMoments(*(None if m is None else m.to(device) for m in vars(self).values()))


@dataclass(frozen=True)
class Narrowing:
    """How attention is cut before anything else, where the width is heads times head size."""

    heads: tuple[HeadMoments, ...]
    """By layer."""
    groups: int
    """KV groups of the dense model."""
    num_key_value_heads: int
    """KV groups kept."""
    head_dim: int
    """Dimensions that every head keeps."""


@dataclass(frozen=True)
class Winners:
    """What a learned mask keeps of every layer, and the gates it leaves there: 0 for the others.

    None: nothing was learned there.
    """

    neurons_LF: Tensor | None = None
    """Of the FFN's neurons."""
    groups_LG: Tensor | None = None
    """Of the KV groups."""

    def gates(self, axis: str) -> Tensor | None:
        """Those of the units that a writer reads, by the axis it reads along, `(L, units)`."""
        return self.neurons_LF if axis == FFN else self.groups_LG

    def kept(self, axis: str, layer: int) -> Tensor | None:
        """Numbers of the units that stay, rising."""
        gates_LU = self.gates(axis)
        return None if gates_LU is None else gates_LU[layer].nonzero()[:, 0]

    def to(self, device: torch.device) -> "Winners":
        """The same on another device."""
        return Winners(*(None if g is None else g.to(device) for g in vars(self).values()))


@dataclass(frozen=True)
class Projection:
    """How the small model's coordinates come from the dense one's."""

    basis_DK: Tensor
    """`T`, old to new, float64: orthonormal columns, or under LayerNorm `Z U^T`."""
    tied_scale_K: Tensor | None = None
    """The `s` of `moments.tied_rotation`, where the head shares the embedding table."""
    embedding_EJ: Tensor | None = None
    """Old to new embedding coordinates, orthonormal columns, where the small model has
    projections between embeddings and stream."""
    gated_DK: Tensor | None = None
    """`T` with the gates that a learned mask leaves on the stream: `T diag(z)`. What writes into
    the stream writes through it, what reads from it does not."""
    narrowing: Narrowing | None = None
    """For families whose width is heads times head size."""
    winners: Winners | None = None
    """Of a learned mask; None: neurons and groups are chosen by the refit."""

    def writes(self) -> Tensor:
        """What the dense stream goes through to become the small one, but for `c`."""
        return self.basis_DK if self.gated_DK is None else self.gated_DK

    def to(self, device: torch.device) -> "Projection":
        """The same on another device."""
        if device == self.basis_DK.device:
            return self
        moved = {name: None if t is None else t.to(device) for name, t in self.tensors().items()}
        narrowing, winners = self.narrowing, self.winners
        if narrowing is not None:
            heads = tuple(moments.to(device) for moments in narrowing.heads)
            narrowing = replace(narrowing, heads=heads)
        if winners is not None:
            winners = winners.to(device)
        return Projection(**moved, narrowing=narrowing, winners=winners)

    def tensors(self) -> dict[str, Tensor | None]:
        """Its matrices, by name."""
        return {n: t for n, t in vars(self).items() if n not in ("narrowing", "winners")}


def stream_scale(basis_DK: Tensor) -> float:
    """`c = sqrt(K / D)`."""
    return math.sqrt(basis_DK.shape[1] / basis_DK.shape[0])


def project_group(
    family: Family, group: Group, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    """Transform one group; the result has names and shapes of the small model."""
    if group.name == "embeddings":
        return _project_embeddings(family, tensors, projection)
    if group.name == "head":
        return _project_head(family, tensors, projection)
    return _project_layer(family, group, tensors, projection)


def project_table(table_VD: Tensor, basis_DK: Tensor) -> Tensor:
    """An embedding table: `c E T`."""
    return stream_scale(basis_DK) * (table_VD.to(basis_DK) @ basis_DK)


def project_writer(weight_DF: Tensor, basis_DK: Tensor) -> Tensor:
    """A writer's matrix `(D, F)` or bias `(D,)`: `c T^T W`."""
    return stream_scale(basis_DK) * (basis_DK.T @ weight_DF.to(basis_DK))


def norm_of(
    family: Family, norm: str, tensors: Mapping[str, Tensor], like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A norm's weight, with what the class adds to it, and its bias, in the dtype of `like`."""
    bias_D = tensors.get(f"{norm}.bias")
    weight_D = tensors[f"{norm}.weight"].to(like) + family.norm_offset
    return weight_D, None if bias_D is None else bias_D.to(like)


def place_reader(
    tensors: dict[str, Tensor], name: str, weight_FK: Tensor, constant_F: Tensor | None
) -> None:
    """Set a reader that also takes in a constant: by its bias, or through the spare direction.

    `tensors[name + ".bias"]`, if there is one, holds what the bias is without the constant.
    """
    bias = f"{name}.bias"
    if constant_F is not None and bias in tensors:
        tensors[bias] = tensors[bias].to(weight_FK) + constant_F
    elif constant_F is not None:
        weight_FK = weight_FK - weight_FK.mean(1, keepdim=True)
        weight_FK = weight_FK + constant_F[:, None] / weight_FK.shape[1]
    tensors[f"{name}.weight"] = weight_FK


def plain_norm(
    family: Family, tensors: dict[str, Tensor], norm: str, readers: list[str], basis_DK: Tensor
) -> None:
    """Set a norm to weight 1 and, for readers without a bias, bias 1: their constants' carrier."""
    ones_K = torch.ones(basis_DK.shape[1], dtype=basis_DK.dtype, device=basis_DK.device)
    tensors[f"{norm}.weight"] = ones_K - family.norm_offset
    if family.norm_bias:
        carries = any(f"{reader}.bias" not in tensors for reader in readers)
        tensors[f"{norm}.bias"] = ones_K.clone() if carries else torch.zeros_like(ones_K)


def head_reader(
    family: Family, tensors: Mapping[str, Tensor], projection: Projection
) -> tuple[str, Tensor, Tensor | None]:
    """The module that reads the final norm, its matrix in old coordinates with that norm's weight
    folded in, `(F, D)`, and the constant that the norm's bias gives it.

    That is the head, or with projections the one before a head that stays as it is.
    """
    weight_D, bias_D = norm_of(family, family.final_norm, tensors, projection.basis_DK)
    out = family.projections[1] if family.projections else ""
    matrix_ED = tensors.get(f"{out}.weight")
    if projection.embedding_EJ is not None:
        name, matrix_FD = out, _unembedding(tensors[f"{family.head}.weight"], projection)
        if matrix_ED is not None:
            matrix_FD = matrix_FD @ matrix_ED.to(matrix_FD)
    else:
        name, matrix_FD = family.head, tensors[f"{family.head}.weight"].to(weight_D)
        if matrix_ED is not None:
            matrix_FD = matrix_FD @ matrix_ED.to(matrix_FD)
    return name, matrix_FD * weight_D, None if bias_D is None else matrix_FD @ bias_D


def narrow_attention(
    family: Family,
    group: Group,
    tensors: Mapping[str, Tensor],
    projection: Projection,
) -> dict[str, Tensor]:
    """The layer with fewer heads, or with heads of fewer dimensions, still in old coordinates.

    Heads shrink by SP3's projections (`heads`), or KV groups go whole, those first whose outputs
    write least into the kept stream. What is lost of an output's mean goes to the writer's bias,
    if it has one.
    """
    narrowing, basis_DK = projection.narrowing, projection.basis_DK
    if narrowing is None:
        return dict(tensors)
    moments, found = narrowing.heads[group.layer], dict(tensors)
    heads, full = moments.mean_HE.shape
    writer = f"{group.prefix}{family.writers[0]}"
    kept_writer_DQ = basis_DK @ (basis_DK.T @ tensors[f"{writer}.weight"].to(basis_DK))
    writer_HDE = split_writer(kept_writer_DQ, full, heads)
    # Where no bias can take an output's mean, the mean counts with the rest.
    has_bias, mean_HE = f"{writer}.bias" in tensors, moments.mean_HE
    output_HEE = moments.output_HEE
    if not has_bias:
        output_HEE = output_HEE + mean_HE[..., :, None] * mean_HE[..., None, :]
    if narrowing.head_dim < full:
        maps = query_key_projection(moments.query_HEE, moments.key_HEE, narrowing.head_dim)
        value_HEP, writer_HDP, constant_HD = value_output_projection(
            output_HEE, writer_HDE, narrowing.head_dim, mean_HE if has_bias else None
        )
        for reader, map_HEP in zip(family.sites[0].readers, (*maps, value_HEP), strict=True):
            for name in (f"{group.prefix}{reader}.weight", f"{group.prefix}{reader}.bias"):
                if name in tensors:
                    found[name] = project_heads(tensors[name], map_HEP)
        width = len(kept_writer_DQ)
        found[f"{writer}.weight"], constant_D = join_writer(writer_HDP, constant_HD, width)
    else:
        groups = narrowing.groups
        kept_G = projection.winners and projection.winners.kept(KEY_VALUE, group.layer)
        if kept_G is None:
            kept_G = _strongest(output_HEE, writer_HDE, groups, narrowing.num_key_value_heads)
        gone_G = _others(kept_G, groups)
        unit = heads // groups * full
        units = {QUERY: unit, KEY_VALUE: full, INTERLEAVED: 3 * unit}
        sizes = {QUERY: heads * full, KEY_VALUE: groups * full, INTERLEAVED: 3 * heads * full}
        found = cut_units(group, found, kept_G, units, sizes)
        gone_H = _members(gone_G, heads // groups)
        constant_D = (writer_HDE[gone_H] @ mean_HE[gone_H][..., None]).sum((0, 2))
    if has_bias:
        found[f"{writer}.bias"] = tensors[f"{writer}.bias"].to(constant_D) + constant_D
    return found


def gate_writers(
    family: Family, group: Group, tensors: Mapping[str, Tensor], winners: Winners | None
) -> dict[str, Tensor]:
    """The same layer with the gates of a learned mask folded into what its writers read."""
    found = dict(tensors)
    for writer, axis in gated_writers(family, group):
        gates_LU = None if winners is None else winners.gates(axis)
        name = f"{group.prefix}{writer}.weight"
        if gates_LU is not None:
            gates_U = gates_LU[group.layer]
            gates_P = gates_U.repeat_interleave(tensors[name].shape[1] // len(gates_U))
            found[name] = tensors[name].to(gates_P) * gates_P
    return found


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
    """Keep some units only of the tensors given, of `units` members along every axis that goes
    with them; `sizes` are the axes' lengths before.
    """
    found = dict(tensors)
    for name, axes in group.parameters.items():
        for dim, axis in enumerate(axes):
            rows = kept_rows(axis, kept_U, units, sizes)
            if rows is not None and name in found:
                found[name] = found[name].index_select(dim, rows.to(found[name].device))
    return found


def kept_rows(
    axis: Axis, kept_U: Tensor, cut_axes: Mapping[str, int], sizes: Mapping[str, int]
) -> Tensor | None:
    """Indices along an axis that belong to kept units, `cut_axes` of them an axis; None: all."""
    parts = (axis,) if isinstance(axis, str) else axis
    if not any(part in cut_axes for part in parts):
        return None
    rows, start = [], 0
    for part in parts:
        size = cut_axes.get(part)
        if size is None:
            rows.append(start + torch.arange(sizes[part], device=kept_U.device))
        else:
            offsets = torch.arange(size, device=kept_U.device)
            rows.append(start + (kept_U[:, None] * size + offsets).reshape(-1))
        start += sizes[part]
    return torch.cat(rows)


def _members(units_U: Tensor, size: int) -> Tensor:
    """Indices of the members of units of one size."""
    return (units_U[:, None] * size + torch.arange(size, device=units_U.device)).reshape(-1)


def _others(units_U: Tensor, count: int) -> Tensor:
    """Numbers below `count` that are not among those given, rising."""
    is_left = torch.ones(count, dtype=torch.bool, device=units_U.device)
    is_left[units_U] = False
    return is_left.nonzero()[:, 0]


def _strongest(output_HEE: Tensor, writer_HDE: Tensor, groups: int, keep: int) -> Tensor:
    """KV groups that write most, `tr(W C W^T)`, rising."""
    energy_H = ((writer_HDE @ output_HEE) * writer_HDE).sum((1, 2))
    order_G = energy_H.reshape(groups, -1).sum(1).argsort(descending=True, stable=True)
    return order_G[:keep].sort().values


def _unembedding(table_VE: Tensor, projection: Projection) -> Tensor:
    """What turns the vector that a table of old coordinates scores into one for the kept ones,
    `(J, E)`: least squares over the scores, free of their mean, which no softmax sees.
    """
    embedding_EJ = projection.embedding_EJ
    if embedding_EJ.shape[0] == embedding_EJ.shape[1]:
        return embedding_EJ.T
    table_VE = table_VE.to(embedding_EJ)
    table_VE = table_VE - table_VE.mean(0)
    scores_EE = table_VE.T @ table_VE
    inner_JJ = embedding_EJ.T @ scores_EE @ embedding_EJ
    inner_JJ.diagonal().add_(1e-9 * inner_JJ.diagonal().mean())
    return torch.linalg.solve(inner_JJ, embedding_EJ.T @ scores_EE)


def _project_embeddings(
    family: Family, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    writes_DK = projection.writes()
    width, kept = writes_DK.shape
    into_DE = tensors.get(f"{(family.projections or ('',))[0]}.weight")
    projected = {}
    for name in family.embeddings:
        table = tensors[name].to(writes_DK)
        if name != family.embedding:
            projected[name] = project_table(table, writes_DK)
        elif projection.embedding_EJ is not None:
            embedding_EJ = projection.embedding_EJ
            into_JD = embedding_EJ.T if into_DE is None else embedding_EJ.T @ into_DE.to(table).T
            projected[name] = table @ embedding_EJ
            projected[f"{family.projections[0]}.weight"] = project_table(into_JD, writes_DK).T
        else:
            table = table if into_DE is None else table @ into_DE.to(table).T
            scale = embedding_scale(family, width) / embedding_scale(family, kept)
            projected[name] = scale * project_table(table, writes_DK)
    return projected


def _project_layer(
    family: Family, group: Group, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    basis_DK, projected = projection.basis_DK, dict(tensors)
    for site in group.sites:
        norm = f"{group.prefix}{site.norm}"
        readers = [f"{group.prefix}{reader}" for reader in site.readers]
        weight_D, bias_D = norm_of(family, norm, tensors, basis_DK)
        for reader in readers:
            matrix_FD = tensors[f"{reader}.weight"].to(basis_DK)
            constant_F = None if bias_D is None else matrix_FD @ bias_D
            reader_FK = (matrix_FD * weight_D) @ basis_DK / stream_scale(basis_DK)
            place_reader(projected, reader, reader_FK, constant_F)
        plain_norm(family, projected, norm, readers, basis_DK)
    for writer in group.writers:
        for part in ("weight", "bias"):
            name = f"{group.prefix}{writer}.{part}"
            if name in tensors:
                projected[name] = project_writer(tensors[name], projection.writes())
    return projected


def _project_head(
    family: Family, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    basis_DK, scale = projection.basis_DK, stream_scale(projection.basis_DK)
    if projection.tied_scale_K is not None:
        # The table of the embeddings is `t E T`, and `diag(g) T / c` is read through it.
        width, kept = basis_DK.shape
        table_scale = scale * embedding_scale(family, width) / embedding_scale(family, kept)
        weight_K = projection.tied_scale_K / (scale * table_scale)
        return {f"{family.final_norm}.weight": weight_K - family.norm_offset}
    name, matrix_FD, constant_F = head_reader(family, tensors, projection)
    projected: dict[str, Tensor] = {}
    place_reader(projected, name, matrix_FD @ basis_DK / scale, constant_F)
    plain_norm(family, projected, family.final_norm, [name], basis_DK)
    return projected
