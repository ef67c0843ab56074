"""Heads of fewer dimensions: SP3's per-head projections (docs/design.md 3.6). Tensors only.

Without rotary embedding a head is two bilinear forms, queries with keys and values with the
writer, and each may be cut to fewer dimensions by one SVD (SP3, arXiv 2308.16475). Every head
keeps as many as every other, so that the output is stock:

    scores  q^T k E^-1/2      ->  q'^T k' P^-1/2,  q' = A^T q,  k' = B^T k
    output  sum_h W_h a_h + b ->  sum_h W'_h a'_h + b',  a'_h = V_h^T a_h

`a`, a head's output, is an average of its values with weights that sum to one, so what maps
values maps outputs, biases with them.

Moments and results are float64; weights are taken as they are and the caller rounds once. Where
E dimensions are kept nothing is lost and the maps are the identity. A root of a moment leaves out
eigenvalues below `E eps` of its largest (`eps` float64's, 2e-16), which rounding alone can make;
so do the maps of queries and keys with singular values. Nothing else is divided by, so singular
moments, zeros among them, give finite maps.

Shape suffixes: D residual width, E head dim, P the head dim kept, H query heads, G key/value
heads (H of them but with grouped queries), R = D H / G the stacked rows of the writers of one
group, Q = H E or G E. A leading `...` is batched over.
"""

import math

import torch
from torch import Tensor


def query_key_projection(
    query_second_moment_EE: Tensor, key_covariance_EE: Tensor, kept: int
) -> tuple[Tensor, Tensor]:
    """Maps of queries and keys that keep their products best.

    Minimises `E|q^T k - q'^T k'|^2 = |S_q^1/2 (I - A B^T) S_k^1/2|_F^2` over rank `kept`, queries
    and keys taken as independent: with `X = S_q^1/2 S_k^1/2 = U s V^T`, the product is
    `A B^T = S_k^1/2 V s^-1 U^T S_q^1/2` over the first `kept` singular values (what
    `S_q^-1/2 U s V^T S_k^-1/2` comes to, and no moment is inverted), and the error the sum of the
    `s^2` left out. Balanced: queries and keys both come to have second moment `diag(s)`. The stock
    model's `P^-1/2` for `E^-1/2` is made good in the map of queries, `A <- sqrt(P / E) A`.

    `query_second_moment_EE`, `(..., E, E)`: `S_q = E[q q^T]`, bias included and *not* centred,
    since a query's mean weighs the keys; with grouped queries, the sum over the group's heads:
    the best maps for one key are the same for all of them. `key_covariance_EE`, `(..., E, E)`:
    `S_k` of keys centred, since softmax ignores a shift common to all keys.

    Returns `A` and `B`, `(..., E, P)`, float64.
    """
    if kept == query_second_moment_EE.shape[-1]:
        return _identity(query_second_moment_EE), _identity(key_covariance_EE)
    return first_dimensions(query_key_maps(query_second_moment_EE, key_covariance_EE), kept)


def query_key_maps(
    query_second_moment_EE: Tensor, key_covariance_EE: Tensor
) -> tuple[Tensor, Tensor]:
    """The maps of `query_key_projection` for whatever number of dimensions is kept: their first
    columns are those, but for the factor (`first_dimensions`). `(..., E, E)`.
    """
    query_root_EE, key_root_EE = _root(query_second_moment_EE), _root(key_covariance_EE)
    left_EE, values_E, right_EE = torch.linalg.svd(query_root_EE.mT @ key_root_EE)
    alive_E = values_E > _cutoff(values_E.amax(-1, keepdim=True), values_E.shape[-1])
    scale_1E = torch.where(alive_E, values_E, torch.inf).rsqrt()[..., None, :]
    return (key_root_EE @ right_EE.mT) * scale_1E, (query_root_EE @ left_EE) * scale_1E


def first_dimensions(maps_EE: tuple[Tensor, Tensor], kept: int) -> tuple[Tensor, Tensor]:
    """`A` and `B` of `query_key_projection`, from `query_key_maps`."""
    query_map_EE, key_map_EE = maps_EE
    factor = math.sqrt(kept / query_map_EE.shape[-1])
    return factor * query_map_EE[..., :kept], key_map_EE[..., :kept]


def value_output_projection(
    output_second_moment_EE: Tensor,
    writer_RE: Tensor,
    kept: int,
    mean_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A map of values, and a writer of what it leaves, that keep what the head writes best.

    Minimises `E|W a - W' V^T a - b|^2` over rank `kept`: with `W C^1/2 = U s Y^T`, the writer is
    `W' = U` and the map `V = W^T U`, over the first `kept` singular values, and the error the sum
    of the `s^2` left out. The writer's columns are orthonormal.

    `output_second_moment_EE`, `(..., E, E)`: `C = E[a a^T]`, the head's output before the writer,
    or, where `mean_E`, `(..., E)`, is given, the covariance around that mean: then no dimension
    is spent on the mean, which goes into the constant `b = (W - W' V^T) E[a]`. That is never
    worse. `writer_RE`, `(..., R, E)`: the head's columns of the writer. `kept` is at most R.

    With grouped queries the heads that share values stack their writers as rows (`split_writer`)
    and `C` and the mean are those of the outputs of all of them together. That is the best where
    their outputs have the same moments, and close to it elsewhere.

    Returns `V`, `(..., E, P)`, `W'`, `(..., R, P)`, and `b`, `(..., R)`, zero without a mean; all
    float64.
    """
    writer_RE = writer_RE.to(output_second_moment_EE)
    if kept == writer_RE.shape[-1]:
        return _identity(output_second_moment_EE), writer_RE, torch.zeros_like(writer_RE[..., 0])
    root_EE = _root(output_second_moment_EE)
    new_writer_RP = torch.linalg.svd(writer_RE @ root_EE, full_matrices=False)[0][..., :kept]
    map_EP = writer_RE.mT @ new_writer_RP
    constant_R = torch.zeros_like(writer_RE[..., 0])
    if mean_E is not None:
        lost_RE = writer_RE - new_writer_RP @ map_EP.mT
        constant_R = (lost_RE @ mean_E.to(lost_RE)[..., None])[..., 0]
    return map_EP, new_writer_RP, constant_R


def query_key_errors(query_second_moment_EE: Tensor, key_covariance_EE: Tensor) -> Tensor:
    """`E|q^T k - q'^T k'|^2` of `query_key_projection`, by how many dimensions are left out, none
    first: `(..., E)`.
    """
    product_EE = _root(query_second_moment_EE).mT @ _root(key_covariance_EE)
    return _tails(torch.linalg.svdvals(product_EE))


def value_output_errors(output_second_moment_EE: Tensor, writer_RE: Tensor) -> Tensor:
    """`E|W a - W' V^T a|^2` of `value_output_projection`, by how many dimensions are left out, none
    first: `(..., E)`.
    """
    written_RE = writer_RE.to(output_second_moment_EE) @ _root(output_second_moment_EE)
    values = torch.linalg.svdvals(written_RE)
    full = writer_RE.shape[-1]
    return _tails(torch.nn.functional.pad(values, (0, full - values.shape[-1])))


def _tails(values_E: Tensor) -> Tensor:
    """Sums of the squares of the last 0, 1, ... of falling values, `(..., E)`."""
    sums_E = values_E.square().flip(-1).cumsum(-1)
    return torch.cat([torch.zeros_like(sums_E[..., :1]), sums_E[..., :-1]], -1)


def project_heads(rows_QD: Tensor, map_GEP: Tensor) -> Tensor:
    """The weight `(H E, D)` or bias `(H E,)` of queries, keys or values, each head's through its
    map: `(H P, D)` or `(H P,)`, float64.

    Fewer maps than heads are shared by consecutive ones, as grouped queries are.
    """
    groups, full = map_GEP.shape[:2]
    rows_GgED = rows_QD.to(map_GEP).reshape(groups, -1, full, *rows_QD.shape[1:])
    projected_GgPD = torch.einsum("ghe...,gep->ghp...", rows_GgED, map_GEP)
    return projected_GgPD.reshape(-1, *rows_QD.shape[1:])


def split_writer(writer_DQ: Tensor, head_dim: int, groups: int) -> Tensor:
    """A writer `(D, H E)` by groups of heads that share values, `(G, R, E)`: the rows of a group's
    heads, one below the other.
    """
    width = writer_DQ.shape[0]
    writer_DGgE = writer_DQ.reshape(width, groups, -1, head_dim)
    return writer_DGgE.permute(1, 2, 0, 3).reshape(groups, -1, head_dim)


def join_writer(writer_GRP: Tensor, constant_GR: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The writer `(D, H P)` of groups as `split_writer` leaves them, and what the constants of all
    heads add to its bias, `(D,)`.
    """
    groups, _, kept = writer_GRP.shape
    writer_GgDP = writer_GRP.reshape(groups, -1, width, kept)
    joined_DQ = writer_GgDP.permute(2, 0, 1, 3).reshape(width, -1)
    return joined_DQ, constant_GR.reshape(-1, width).sum(0)


def _root(moment_EE: Tensor) -> Tensor:
    """`L` with `L L^T = S`, `(..., E, E)`: eigenvectors times the roots of eigenvalues."""
    values_E, vectors_EE = torch.linalg.eigh((moment_EE + moment_EE.mT) / 2)
    alive_E = values_E > _cutoff(values_E[..., -1:], values_E.shape[-1])
    return vectors_EE * torch.where(alive_E, values_E, 0).sqrt()[..., None, :]


def _cutoff(largest_1: Tensor, size: int) -> Tensor:
    """The bound below which an eigen- or singular value is rounding alone, from the largest of
    `size` of them.
    """
    return largest_1.clamp_min(0) * size * torch.finfo(largest_1.dtype).eps


def _identity(like_EE: Tensor) -> Tensor:
    """Identity matrices of the shape, dtype and device of `like_EE`, `(..., E, E)`."""
    eye_EE = torch.eye(like_EE.shape[-1], dtype=like_EE.dtype, device=like_EE.device)
    return eye_EE.expand_as(like_EE).clone()
