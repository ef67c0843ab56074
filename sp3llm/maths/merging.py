"""Key-value heads merged into fewer, each query head kept (docs/design.md 3.6). Tensors only.

Under rotary embedding dimension `i` of a head and dimension `i + E / 2` are turned together, by an
angle that both heads of a pair share: as one complex number, a plane of a head is multiplied by
`e^(i theta)`. What keeps a plane's turning is a complex factor, no more. So the keys of several
heads become one head's plane by plane, `k_g ~ a_g k`, where the factors go to the queries,
`Re(q conj(k_g)) ~ Re(q conj(a_g) conj(k))`; and values, which nothing turns, become one head's by
any linear map, whose counterparts go to the writer.

Everything is float64. Weights are `(rows, D)` with what they are multiplied by along `D`: a bias is
one more column, whose input is 1.

Shape suffixes: D inputs, E head dim, P = E / 2 planes, H query heads, G key-value heads, M heads
merged into one, N output width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """The matrices of one layer's attention, biases as a last column."""

    query_QD: Tensor
    key_CD: Tensor
    value_CD: Tensor
    writer_NQ: Tensor


def merge_heads(dense: Attention, moment_DD: Tensor, head_dim: int, kept: int) -> Attention:
    """The same attention with `kept` key-value heads, and as many query heads as before.

    Heads are put together by which keys are most alike, as many to each, `M = G / kept`. Keys
    minimise `sum_g w_g E|k_g - a_g k|^2` in every plane, `w_g` the energy of the group's queries
    there: the first principal component of the `k_g`, weighed. Values minimise
    `sum_h E|O_h (v_g - B_g v)|^2`, `O_h` the columns of the writer for a query head: the first `E`
    principal components of all the group's values as the writer weighs them. Query heads come in
    the order of the heads they are put to. `moment_DD` is the second moment `E[x x^T]` of the
    input, 1 included.
    """
    rows = moment_DD.shape[0]
    query_HPD, key_GPD = (_planes(w, head_dim) for w in (dense.query_QD, dense.key_CD))
    heads, groups = len(query_HPD), len(key_GPD)
    moment = moment_DD.to(torch.complex128)
    key_PGG = torch.einsum("gpd,hpd->pgh", key_GPD @ moment, key_GPD.conj())
    energy_HP = ((query_HPD @ moment) * query_HPD.conj()).sum(-1).real
    energy_GP = energy_HP.reshape(groups, heads // groups, -1).sum(1).clamp_min(0)
    weighed_PGG = key_PGG * (energy_GP[:, None] * energy_GP).sqrt().permute(2, 0, 1)
    value_GED = dense.value_CD.reshape(groups, head_dim, rows)
    writer_HNE = dense.writer_NQ.reshape(len(dense.writer_NQ), heads, head_dim).transpose(0, 1)
    queries, keys, values, writers = [], [], [], []
    for members in _alike(weighed_PGG, kept):
        factor_MP, key_PD = _one_key(weighed_PGG, energy_GP, key_GPD, members)
        of_group_MGND = writer_HNE.unflatten(0, (groups, -1))[members]
        value_ED, maps_MEE = _one_value(value_GED[members], of_group_MGND, moment_DD)
        keys.append(_rows(key_PD))
        values.append(value_ED)
        group_query = query_HPD.unflatten(0, (groups, -1))[members]
        turned = group_query * factor_MP.conj()[:, None, :, None]
        queries += [_rows(head_PD) for head_PD in turned.flatten(0, 1)]
        writers += list((of_group_MGND @ maps_MEE[:, None]).flatten(0, 1))
    return Attention(
        torch.cat(queries), torch.cat(keys), torch.cat(values), torch.cat(writers, dim=1)
    )


def _planes(weight_QD: Tensor, head_dim: int) -> Tensor:
    """Rows of heads as complex planes, `(heads, P, D)`."""
    real, imaginary = weight_QD.unflatten(0, (-1, 2, head_dim // 2)).unbind(1)
    return torch.complex(real, imaginary)


def _rows(head_PD: Tensor) -> Tensor:
    """A head's planes as rows again, `(E, D)`."""
    return torch.cat([head_PD.real, head_PD.imag])


def _alike(weighed_PGG: Tensor, kept: int) -> list[list[int]]:
    """The heads by which are put together: from the first that is left on, those whose keys come
    closest to being its own.
    """
    energy_G = weighed_PGG.diagonal(dim1=1, dim2=2).real.sum(0)
    # What the first principal component of two heads leaves, summed over planes.
    pair = weighed_PGG.diagonal(dim1=1, dim2=2).real.T
    sums = pair[:, None] + pair
    gap = ((pair[:, None] - pair) ** 2 + 4 * weighed_PGG.permute(1, 2, 0).abs() ** 2).sqrt()
    lost_GG = ((sums - gap) / 2).sum(-1) / (energy_G[:, None] + energy_G).clamp_min(1e-300)
    groups = len(energy_G)
    left, found = list(range(groups)), []
    while left:
        first = left.pop(0)
        others = sorted(left, key=lambda group: lost_GG[first, group].item())
        members = sorted([first, *others[: groups // kept - 1]])
        left = [group for group in left if group not in members]
        found.append(members)
    return found


def _one_key(
    weighed_PGG: Tensor, energy_GP: Tensor, key_GPD: Tensor, members: list[int]
) -> tuple[Tensor, Tensor]:
    """Factors of each member's queries, `(M, P)`, and the planes of the key that they share, `(P,
    D)`.
    """
    _, vectors_PMM = torch.linalg.eigh(weighed_PGG[:, members][:, :, members])
    first_MP = vectors_PMM[..., -1].T
    root_MP = energy_GP[members].sqrt()
    # A plane that no query of a group has energy in weighs nothing there, and its factor is 0.
    factor_MP = torch.where(root_MP > 0, first_MP / root_MP.clamp_min(1e-300), 0)
    key_PD = ((first_MP.conj() * root_MP)[..., None] * key_GPD[members]).sum(0)
    # As large as the keys were, which a dtype of little range holds best.
    scale_P = (energy_GP[members].sum(0) / len(members)).sqrt().clamp_min(1e-300)
    return factor_MP * scale_P, key_PD / scale_P[:, None]


def _one_value(value_MED: Tensor, writer_MGNE: Tensor, moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The value that members share, `(E, D)`, and what makes each member's of it, `(M, E, E)`."""
    size = value_MED.shape[1]
    value_FD = value_MED.flatten(0, 1)
    metric_FF = torch.block_diag(*(writer_MGNE.transpose(2, 3) @ writer_MGNE).sum(1))
    values_F, vectors_FF = torch.linalg.eigh(metric_FF)
    alive_F = values_F > values_F[-1] * torch.finfo(values_F.dtype).eps * len(values_F)
    root_F = torch.where(alive_F, values_F, 0).clamp_min(0).sqrt()
    inverse_F = torch.where(alive_F, root_F.clamp_min(1e-300).reciprocal(), 0)
    root_FF = (vectors_FF * root_F) @ vectors_FF.T
    weighed_FD = root_FF @ value_FD
    kept_FE = torch.linalg.eigh(weighed_FD @ moment_DD @ weighed_FD.T)[1][:, -size:]
    maps_FE = (vectors_FF * inverse_F) @ vectors_FF.T @ kept_FE
    return kept_FE.T @ weighed_FD, maps_FE.unflatten(0, (-1, size))
