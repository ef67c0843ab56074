"""Fold, rotate, cut: one group of parameters from the old coordinates into the new ones.

With `T` (`D x K`, old to new) and `c = sqrt(K / D)` the new stream is `x' = c x T`; its mean
square equals the old one's where the stream lies in the span of `T`, so the norm's epsilon stays
(DESIGN 3.3). Embeddings become `c E T`, writers `c T^T W`, readers `W diag(g) T / c`, and the
norm weights 1: the constant sits in the readers, where rounding does not hit all channels alike.

Everything is computed in float64; the caller rounds once, when it writes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sp3llm.families import Family, Group


def stream_scale(basis_DK: Tensor) -> float:
    """`c = sqrt(K / D)`."""
    return math.sqrt(basis_DK.shape[1] / basis_DK.shape[0])


def project_group(
    family: Family,
    group: Group,
    tensors: Mapping[str, Tensor],
    basis_DK: Tensor,
    tied_scale_K: Tensor | None = None,
) -> dict[str, Tensor]:
    """Transform one group; the result has the same names, on axes of the new width.

    `basis_DK` is float64 with orthonormal columns. `tied_scale_K` is the `s` of
    `moments.tied_rotation`, for models whose head shares the embedding table.
    """
    if group.name == "embeddings":
        return {name: project_table(tensors[name], basis_DK) for name in group.parameters}
    if group.name == "head":
        return _project_head(family, tensors, basis_DK, tied_scale_K)
    return _project_layer(family, group, tensors, basis_DK)


def project_table(table_VD: Tensor, basis_DK: Tensor) -> Tensor:
    """An embedding table: `c E T`."""
    return stream_scale(basis_DK) * (table_VD.to(basis_DK) @ basis_DK)


def project_reader(weight_FD: Tensor, norm_weight_D: Tensor, basis_DK: Tensor) -> Tensor:
    """A reader with its norm's weight folded in: `W diag(g) T / c`."""
    folded_FD = weight_FD.to(basis_DK) * norm_weight_D.to(basis_DK)
    return (folded_FD @ basis_DK) / stream_scale(basis_DK)


def project_writer(weight_DF: Tensor, basis_DK: Tensor) -> Tensor:
    """A writer's matrix `(D, F)` or bias `(D,)`: `c T^T W`."""
    return stream_scale(basis_DK) * (basis_DK.T @ weight_DF.to(basis_DK))


def _project_layer(
    family: Family, group: Group, tensors: Mapping[str, Tensor], basis_DK: Tensor
) -> dict[str, Tensor]:
    projected = dict(tensors)
    ones_K = torch.ones(basis_DK.shape[1], dtype=basis_DK.dtype, device=basis_DK.device)
    for site in family.sites:
        norm = f"{group.prefix}{site.norm}.weight"
        for reader in site.readers:
            name = f"{group.prefix}{reader}.weight"
            projected[name] = project_reader(tensors[name], tensors[norm], basis_DK)
        projected[norm] = ones_K.clone()
    for writer in family.writers:
        for part in ("weight", "bias"):
            name = f"{group.prefix}{writer}.{part}"
            if name in tensors:
                projected[name] = project_writer(tensors[name], basis_DK)
    return projected


def _project_head(
    family: Family,
    tensors: Mapping[str, Tensor],
    basis_DK: Tensor,
    tied_scale_K: Tensor | None,
) -> dict[str, Tensor]:
    norm, head = f"{family.final_norm}.weight", f"{family.head}.weight"
    if tied_scale_K is not None:
        return {norm: tied_scale_K / stream_scale(basis_DK) ** 2}
    width = basis_DK.shape[1]
    return {
        norm: torch.ones(width, dtype=basis_DK.dtype, device=basis_DK.device),
        head: project_reader(tensors[head], tensors[norm], basis_DK),
    }
