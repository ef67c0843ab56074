"""The global basis: from second moments and metrics to the projection of a shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sp3llm.compression.projection import AttentionCut, Projection
from sp3llm.compression.reading import norm_of
from sp3llm.compression.statistics import Moments
from sp3llm.maths.basis import (
    eigenbasis,
    mean_free_frame,
    metric_basis,
    spread_mean_free_frame,
    spreading_rotation,
    tied_rotation,
)
from sp3llm.maths.diagonal import diagonalising_turn, mean_keeping_basis
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import Family
from sp3llm.models.shapes import Shape


@dataclass(frozen=True)
class _Setting:
    """What a projection depends on beside its columns."""

    dense: Checkpoint
    family: Family
    moments: Moments
    shape: Shape
    """Of the small model."""
    tokens: Tensor | None
    """Calibration token ids, for the basis of a narrower embedding table."""
    turn: str
    """One of `options.choices.TURNS`."""


def choose_basis(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    shape: Shape,
    tokens: Tensor | None = None,
    turn: str = "none",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Projection]:
    """The global basis: top principal components, or the projector of that rank that costs least.

    Under LayerNorm it is taken in the mean-free frame and turned into another one (docs/design.md
    3.4). `tokens` are calibration token ids, which a narrower embedding table is chosen by; `turn`
    is one of `options.choices.TURNS`; `dtype` that of the steps of the search (`metric_basis`).

    Returns all eigenvalues of the summed moments, falling, and the projection.
    """
    eigenvalues_C, basis_DK = columns_of_width(family, moments, shape.hidden_size, dtype)
    setting = _Setting(dense, family, moments, shape, tokens, turn)
    return eigenvalues_C, _projection_along(setting, basis_DK)


def columns_of_width(
    family: Family, moments: Moments, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """What `choose_basis` begins with for all shapes of a hidden size: all eigenvalues of the
    summed moments, falling, and the columns that are kept, before they are turned. Found once.

    Where nothing is cut they are the coordinates that there are: any others would round what can
    stay as it is.
    """
    found, device = moments.columns, moments.sites_DD[0].device
    key, axes = (family.model_type, width), (family.model_type, "axes")
    if key not in found:
        inside = _inside(family, moments)
        if axes not in found:
            found[axes] = _on(torch.device("cpu"), eigenbasis(inside.total()))
        eigenvalues_C, vectors_CC = _on(device, found[axes])
        kept = width - family.centred
        basis_CK = vectors_CC[:, :kept]
        if kept == len(vectors_CC):
            basis_CK = torch.eye(kept, dtype=vectors_CC.dtype, device=device)
        elif inside.metrics_DD:
            sites = (inside.sites_DD, inside.metrics_DD)
            basis_CK = metric_basis(*sites, vectors_CC, kept, dtype=dtype)
        # On the host: a GPU has no room for a basis of every width that is searched.
        found[key] = _on(torch.device("cpu"), (eigenvalues_C, _outside(family, basis_CK)))
    return _on(device, found[key])


def _on(device: torch.device, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    one, two = pair
    return one.to(device), two.to(device)


def learned_basis(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    shape: Shape,
    tokens: Tensor,
    columns_DK: Tensor,
    gates_K: Tensor | None,
    turn: str = "none",
) -> tuple[Tensor, Projection]:
    """As `choose_basis`, but with the columns that a learned mask kept, `(D, K)`, and the gates
    that it left on them, `(K,)`; None: all are open.
    """
    eigenvalues_C, _ = eigenbasis(_inside(family, moments).total())
    setting = _Setting(dense, family, moments, shape, tokens, turn)
    return eigenvalues_C, _projection_along(setting, columns_DK, gates_K)


def nested_frame(family: Family, moments: Moments, widths: Sequence[int]) -> Tensor:
    """Nested subspaces of the stream, one for each of `widths`, as columns that a learned mask
    chooses from: the first `width` of them span the subspace of that width.

    Each is the subspace that costs least of those within the next wider one. Columns that none of
    them holds come last.

    Returns orthonormal columns, `(D, D)`, or under LayerNorm `(D, D - 1)` and mean-free.
    """
    inside = _inside(family, moments)
    _, frame_CC = eigenbasis(inside.total())
    bands, inner_CW = [], frame_CC
    for width in sorted({width - family.centred for width in widths}, reverse=True):
        if width >= inner_CW.shape[1] or not inside.metrics_DD:
            continue
        within = tuple(
            tuple(inner_CW.T @ one_CC @ inner_CW for one_CC in those_CC)
            for those_CC in (inside.sites_DD, inside.metrics_DD)
        )
        start_WW = torch.eye(inner_CW.shape[1], dtype=inner_CW.dtype, device=inner_CW.device)
        kept_WK = metric_basis(*within, start_WW, width)
        given_up_WR = torch.linalg.qr(kept_WK, mode="complete")[0][:, width:]
        bands.append(inner_CW @ given_up_WR)
        inner_CW = inner_CW @ kept_WK
    return _outside(family, torch.cat([inner_CW, *bands[::-1]], 1))


def _projection_along(
    setting: _Setting, basis_DK: Tensor, gates_K: Tensor | None = None
) -> Projection:
    """The projection of a shape along orthonormal columns, `(D, K)`; under LayerNorm `(D, K - 1)`,
    which are turned into another mean-free frame. The turn `hadamard` spreads the energy over the
    kept channels, where no tie fixes the rotation (docs/design.md 3.11).

    For tied models without projections the basis is turned so that the tie holds (docs/design.md
    3.5), which leaves gates of the stream no place: they count as open, as they do where norms sit
    on the stream. Where embeddings keep a
    width of their own, a narrower one gets a basis from the calibration tokens.
    """
    dense, family, shape = setting.dense, setting.family, setting.shape
    is_spread = setting.turn == "hadamard"
    gated_DK = None if gates_K is None else basis_DK * gates_K
    rotation_KK = None
    if family.post_norm:
        basis_DK = mean_keeping_basis(basis_DK)
    elif family.centred:
        new_frame = spread_mean_free_frame if is_spread else mean_free_frame
        rotation_KK = new_frame(shape.hidden_size, basis_DK.device).T
    elif is_spread:
        rotation_KK = spreading_rotation(shape.hidden_size, basis_DK.device)
    if rotation_KK is not None:
        basis_DK = basis_DK @ rotation_KK
        gated_DK = None if gated_DK is None else gated_DK @ rotation_KK
    attention_cut = attention_cut_of(dense, family, setting.moments, shape)
    if family.post_norm:
        return Projection(_turned(setting, basis_DK), attention_cut=attention_cut)
    tied_scale_K, embedding_EJ = None, None
    if shape.tie_word_embeddings and family.projections is None:
        norm = f"{family.final_norm}.weight"
        norm_D, _ = norm_of(family, family.final_norm, dense.read([norm]), basis_DK)
        basis_DK, tied_scale_K = tied_rotation(basis_DK, norm_D)
        gated_DK = None
    elif shape.tie_word_embeddings:
        embedding_EJ = _embedding_basis(setting, basis_DK)
    return Projection(basis_DK, tied_scale_K, embedding_EJ, gated_DK, attention_cut)


def _turned(setting: _Setting, basis_DK: Tensor) -> Tensor:
    """The basis of a post-norm model, turned such that its norms' weights stay diagonal as far as
    can be; found once for all shapes of a hidden size.
    """
    found, key = setting.moments.columns, ("turned", basis_DK.shape[1])
    if key not in found:
        weights_WD = _norm_weights(setting).to(basis_DK)
        found[key] = (weights_WD, diagonalising_turn(basis_DK, weights_WD))
    return found[key][1]


def _norm_weights(setting: _Setting) -> Tensor:
    """The weights of all norms on the stream, `(norms, D)`, float64."""
    dense, family = setting.dense, setting.family
    layers = families.groups(family, dense.config)[1:-1]
    norms = [family.embedding_norm]
    norms += [f"{layer.prefix}{site.norm}" for layer in layers for site in layer.sites]
    tensors = dense.read(f"{norm}.weight" for norm in norms)
    return torch.stack([tensor.double() + family.norm_offset for tensor in tensors.values()])


def _inside(family: Family, moments: Moments) -> Moments:
    """Moments in the coordinates that a basis is taken in: under LayerNorm the mean-free frame."""
    if not family.centred:
        return moments
    width, device = len(moments.sites_DD[0]), moments.sites_DD[0].device
    frame_DC = mean_free_frame(width, device)

    def inside(those_DD: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(frame_DC.T @ one_DD @ frame_DC for one_DD in those_DD)

    return Moments(inside(moments.sites_DD), inside(moments.metrics_DD))


def _outside(family: Family, basis_CK: Tensor) -> Tensor:
    """Columns of `_inside`'s coordinates in those of the stream, `(D, K)`."""
    if not family.centred:
        return basis_CK
    return mean_free_frame(len(basis_CK) + 1, basis_CK.device) @ basis_CK


def attention_cut_of(
    dense: Checkpoint, family: Family, moments: Moments, shape: Shape
) -> AttentionCut | None:
    """How attention is cut first, in families whose width is heads times head size."""
    if not families.is_square(family, dense.config):
        return None
    groups = Shape.of(family, dense.config).num_key_value_heads
    return AttentionCut(moments.heads, groups, shape.num_key_value_heads, shape.head_dim)


def _embedding_basis(setting: _Setting, basis_DK: Tensor) -> Tensor:
    """Embedding coordinates to keep, `(E, J)`: those that stream and head miss least.

    The table has two roles, and an error `Q` in it two costs, each relative to all that the role
    does: `tr(A Q C Q)` with `C` the second moment of the embeddings that the text looks up and `A`
    what the stream takes from them, and with `C` that of what the table is multiplied with in the
    end and `A` the table's own moment, free of the mean over the vocabulary, which no softmax
    sees.
    """
    shape, like = setting.shape, basis_DK
    width = families.axis_sizes(setting.family, setting.dense.config)[families.EMBEDDING]
    if shape.word_embed_proj_dim == width:
        return torch.eye(width, dtype=like.dtype, device=like.device)
    roles = table_roles(setting.dense, setting.family, setting.moments, setting.tokens)
    taken_EE = roles.into_ED @ basis_DK @ basis_DK.T @ roles.into_ED.T
    centred_VE = roles.table_VE - roles.table_VE.mean(0)
    scored_EE = centred_VE.T @ centred_VE
    pairs = [(taken_EE, roles.looked_up_EE), (scored_EE, roles.given_EE)]
    metrics_EE = tuple(a_EE / (a_EE * c_EE).sum() for a_EE, c_EE in pairs)
    moments_EE = tuple(c_EE for _, c_EE in pairs)
    # Both of these lie in what the table spans, where nothing needs to be given up.
    spans = (roles.looked_up_EE, scored_EE)
    start_EE = eigenbasis(sum(square_EE / square_EE.trace() for square_EE in spans))[1]
    return metric_basis(moments_EE, metrics_EE, start_EE, shape.word_embed_proj_dim)


@dataclass(frozen=True)
class TableRoles:
    """An embedding table that has a width of its own, in its two roles; float64."""

    table_VE: Tensor
    looked_up_EE: Tensor
    """Second moment, summed over the calibration text, of the embeddings that it looks up."""
    into_ED: Tensor
    """The projection from them into the stream."""
    read_ED: Tensor
    """That from the normalised stream to what the table scores, the final norm folded in."""
    given_EE: Tensor
    """Mean second moment of what the table scores."""


def table_roles(dense: Checkpoint, family: Family, moments: Moments, tokens: Tensor) -> TableRoles:
    """The roles of a table whose family has projections, from the calibration windows `tokens`."""
    tensors, like = head_tensors(dense, family), moments.head_DD
    table_VE = tensors[f"{family.head}.weight"].to(like)
    into, out = (f"{module}.weight" for module in family.projections)
    into_ED = torch.eye(table_VE.shape[1], dtype=like.dtype, device=like.device)
    out_ED = into_ED
    if families.has_projections(family, dense.config):
        into_ED, out_ED = dense.read([into])[into].to(like).T, tensors[out].to(like)
    counts_V = torch.bincount(tokens.flatten(), minlength=len(table_VE)).to(like)
    norm_D, bias_D = norm_of(family, family.final_norm, tensors, like)
    read_ED = out_ED * norm_D
    given_EE = read_ED @ moments.head_DD @ read_ED.T
    if bias_D is not None:
        given_EE = given_EE + torch.outer(out_ED @ bias_D, out_ED @ bias_D)
    looked_up_EE = table_VE.T @ (counts_V[:, None] * table_VE)
    return TableRoles(table_VE, looked_up_EE, into_ED, read_ED, given_EE)
