"""Fold, rotate, cut: one group of parameters from the old coordinates into the new ones.

With `T` (`D x K`, old to new) and `c = sqrt(K / D)` the new stream is `x' = c x T`; its mean
square equals the old one's where the stream lies in the span of `T`, so the norm's epsilon stays
(docs/design.md 3.3). Embeddings become `c E T`, writers `c T^T W`, readers `W diag(g) T / c`, and
the norm weights 1: the constant sits in the readers, where rounding does not hit all channels
alike.

Under LayerNorm `T = Z U^T` makes the new stream free of a mean (docs/design.md 3.4): there is
nothing to centre, and the direction `1_K` that no stream uses carries constants to readers without
a bias.

Everything is computed in float64; the caller rounds once, when it writes.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sp3llm.compression.reading import norm_of
from sp3llm.maths.basis import is_identity, stream_scale
from sp3llm.maths.heads import query_key_maps
from sp3llm.models.families import (
    FFN,
    Family,
    Group,
    embedding_scale,
)

# Ridge, relative to the mean diagonal, of the least squares over a table's scores, whose matrix is
# singular where the table does not span its coordinates.
_SCORES_RIDGE = 1e-9


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

    @functools.cached_property
    def score_maps(self) -> tuple[Tensor, Tensor]:
        """Maps of queries and keys, for whatever size of heads (`maths.heads.query_key_maps`): all
        trials and the model itself share the singular vectors of a layer.
        """
        return query_key_maps(self.query_HEE, self.key_HEE)


@dataclass(frozen=True)
class AttentionCut:
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
class KeptUnits:
    """What a learned mask keeps of every layer, and the gates it leaves there: 0 for the others.

    None: nothing was learned there.
    """

    neurons_LF: Tensor | None = None
    """Of the FFN's neurons."""
    groups_LG: Tensor | None = None
    """Of the KV groups."""

    def gates(self, axis: str) -> Tensor | None:
        """Gates of every layer's neurons or KV groups, `(L, units)`: `axis` is the input axis of
        the writer that reads them. None: no mask was learned there.
        """
        return self.neurons_LF if axis == FFN else self.groups_LG

    def kept(self, axis: str, layer: int) -> Tensor | None:
        """Numbers of the units that stay in a layer, rising; `axis` as in `gates`."""
        gates_LU = self.gates(axis)
        return None if gates_LU is None else gates_LU[layer].nonzero()[:, 0]


@dataclass(frozen=True)
class Projection:
    """How the small model's coordinates come from the dense one's."""

    basis_DK: Tensor
    """`T`, old to new, float64: orthonormal columns, or under LayerNorm `Z U^T`."""
    tied_scale_K: Tensor | None = None
    """The `s` of `maths.basis.tied_rotation`, where the head shares the embedding table."""
    embedding_EJ: Tensor | None = None
    """Old to new embedding coordinates, orthonormal columns, where the small model has
    projections between embeddings and stream."""
    gated_DK: Tensor | None = None
    """`T` with the gates that a learned mask leaves on the stream: `T diag(z)`. What writes into
    the stream writes through it, what reads from it does not."""
    attention_cut: AttentionCut | None = None
    """For families whose width is heads times head size."""
    kept_units: KeptUnits | None = None
    """Of a learned mask; None: neurons and groups are chosen by the refit."""

    @functools.cached_property
    def keeps_channels(self) -> bool:
        """Whether the small stream is in the dense one's coordinates, all of them."""
        return is_identity(self.writes())

    def writes(self) -> Tensor:
        """What the dense stream goes through to become the small one, but for `c`."""
        return self.basis_DK if self.gated_DK is None else self.gated_DK

    def tensors(self) -> dict[str, Tensor | None]:
        """Its matrices, by name."""
        matrices = (field.name for field in fields(self))
        apart = ("attention_cut", "kept_units")
        return {name: getattr(self, name) for name in matrices if name not in apart}


def project_group(
    family: Family, group: Group, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    """Transform one group; the result has names and shapes of the small model."""
    if group.name == "embeddings":
        return _project_embeddings(family, tensors, projection)
    if group.name == "head":
        return _project_head(family, tensors, projection)
    return _project_layer(family, group, tensors, projection)


def project_table(table_VD: Tensor, basis_DK: Tensor, is_same: bool = False) -> Tensor:
    """An embedding table: `c E T`; `is_same`: `T` is the identity."""
    table_VD = table_VD.to(basis_DK)
    return table_VD if is_same else stream_scale(basis_DK) * (table_VD @ basis_DK)


def project_writer(weight_DF: Tensor, basis_DK: Tensor, is_same: bool = False) -> Tensor:
    """A writer's matrix `(D, F)` or bias `(D,)`: `c T^T W`; `is_same`: `T` is the identity."""
    weight_DF = weight_DF.to(basis_DK)
    return weight_DF if is_same else stream_scale(basis_DK) * (basis_DK.T @ weight_DF)


def set_reader(
    tensors: dict[str, Tensor], name: str, weight_FK: Tensor, constant_F: Tensor | None
) -> None:
    """Set a reader's weight in `tensors`, and add a constant to all that it gives.

    The constant, `(F,)`, goes into its bias, of which `tensors[name + ".bias"]` holds the rest; a
    reader without one takes it from the direction `1_K`, in which the stream has nothing but the
    norm's bias has 1.
    """
    bias = f"{name}.bias"
    if constant_F is not None and bias in tensors:
        tensors[bias] = tensors[bias].to(weight_FK) + constant_F
    elif constant_F is not None:
        weight_FK = weight_FK - weight_FK.mean(1, keepdim=True)
        weight_FK = weight_FK + constant_F[:, None] / weight_FK.shape[1]
    tensors[f"{name}.weight"] = weight_FK


def set_norm_to_one(
    family: Family, tensors: dict[str, Tensor], norm: str, readers: list[str], basis_DK: Tensor
) -> None:
    """Set a norm's weight to 1 in `tensors`, and its bias, if it has one, to 0: or to 1, where a
    reader without a bias of its own takes its constant from there (`set_reader`).
    """
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
        name, matrix_FD = out, unembedding(tensors[f"{family.head}.weight"], projection)
        if matrix_ED is not None:
            matrix_FD = matrix_FD @ matrix_ED.to(matrix_FD)
    else:
        name, matrix_FD = family.head, tensors[f"{family.head}.weight"].to(weight_D)
        if matrix_ED is not None:
            matrix_FD = matrix_FD @ matrix_ED.to(matrix_FD)
    return name, matrix_FD * weight_D, None if bias_D is None else matrix_FD @ bias_D


def unembedding(table_VE: Tensor, projection: Projection) -> Tensor:
    """The matrix that takes the vector which a table scores from the table's old coordinates to
    the kept ones, `(J, E)`: by least squares over all scores, free of their mean, which no softmax
    sees.
    """
    embedding_EJ = projection.embedding_EJ
    if embedding_EJ.shape[0] == embedding_EJ.shape[1]:
        return embedding_EJ.T
    table_VE = table_VE.to(embedding_EJ)
    table_VE = table_VE - table_VE.mean(0)
    scores_EE = table_VE.T @ table_VE
    inner_JJ = embedding_EJ.T @ scores_EE @ embedding_EJ
    inner_JJ.diagonal().add_(_SCORES_RIDGE * inner_JJ.diagonal().mean())
    return torch.linalg.solve(inner_JJ, embedding_EJ.T @ scores_EE)


def _project_embeddings(
    family: Family, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    writes_DK, is_same = projection.writes(), projection.keeps_channels
    width, kept = writes_DK.shape
    into_DE = tensors.get(f"{(family.projections or ('',))[0]}.weight")
    projected = {}
    for name in family.embeddings:
        table = tensors[name].to(writes_DK)
        if name != family.embedding:
            projected[name] = project_table(table, writes_DK, is_same)
        elif projection.embedding_EJ is not None:
            embedding_EJ = projection.embedding_EJ
            into_JD = embedding_EJ.T if into_DE is None else embedding_EJ.T @ into_DE.to(table).T
            projected[name] = table @ embedding_EJ
            into_KJ = project_table(into_JD, writes_DK, is_same).T
            projected[f"{family.projections[0]}.weight"] = into_KJ
        else:
            table = table if into_DE is None else table @ into_DE.to(table).T
            scale = embedding_scale(family, width) / embedding_scale(family, kept)
            projected[name] = scale * project_table(table, writes_DK, is_same)
    return projected


def _project_layer(
    family: Family, group: Group, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    basis_DK, projected, is_same = projection.basis_DK, dict(tensors), projection.keeps_channels
    for site in group.sites:
        norm = f"{group.prefix}{site.norm}"
        readers = [f"{group.prefix}{reader}" for reader in site.readers]
        weight_D, bias_D = norm_of(family, norm, tensors, basis_DK)
        for reader in readers:
            matrix_FD = tensors[f"{reader}.weight"].to(basis_DK)
            constant_F = None if bias_D is None else matrix_FD @ bias_D
            reader_FK = matrix_FD * weight_D
            if not is_same:
                reader_FK = reader_FK @ basis_DK / stream_scale(basis_DK)
            set_reader(projected, reader, reader_FK, constant_F)
        set_norm_to_one(family, projected, norm, readers, basis_DK)
    for writer in group.writers:
        for part in ("weight", "bias"):
            name = f"{group.prefix}{writer}.{part}"
            if name in tensors:
                projected[name] = project_writer(tensors[name], projection.writes(), is_same)
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
    set_reader(projected, name, matrix_FD @ basis_DK / scale, constant_F)
    set_norm_to_one(family, projected, family.final_norm, [name], basis_DK)
    return projected
