"""Which neurons or KV groups a writer keeps (Hassibi and Stork 1993). Tensors only.

Shape suffixes: P inputs of the writer, Q outputs, U units, u inputs of a unit, G those that go.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sp3llm.maths.refit import Gram, float32_factor, ridged_factor, solve_towards

# In a round at most one of so many of all units goes: with the survivors brought up to date in
# between that is as good as one unit at a time, and who goes first does not hang on how many do.
_ROUNDS = 64


def select_units(
    gram: Gram,
    prior_PQ: Tensor,
    keep: int,
    unit: int,
    method: str,
    ridge: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Which units of a writer's input to keep: neurons (`unit` 1) or the heads of KV groups.

    The writer `W` that they are judged by is the ridge regression of `gram`, `ridge` relative to
    the mean diagonal, that shrinks towards `prior_PQ`, without an intercept. `dtype` is that of
    the arithmetic: float32 is as good where what is left is fitted afterwards.

    `obs`: drop what costs the refitted writer least; see `drop_units`. `energy`: drop what
    contributes least by itself, `sum_j G_jj |W_j|^2`, which knows nothing of what survivors can
    take over.

    Returns the kept input indices, rising, `(keep * unit,)`. Raises NotFinite if the Gram holds
    NaN or infinity.
    """
    if method == "energy":
        _, weight_PQ = _factor_and_writer(gram, prior_PQ, ridge, dtype)
        score_P = gram.inputs_PP.diagonal() * weight_PQ.square().sum(1)
        kept_U = score_P.reshape(-1, unit).sum(1).topk(keep).indices.sort().values
        return unit_members(kept_U, unit)
    stays_U = torch.ones(len(prior_PQ) // unit, dtype=torch.bool, device=prior_PQ.device)
    for gone_U, _ in drop_units(gram, prior_PQ, keep, unit, ridge, dtype):
        stays_U[gone_U] = False
    return unit_members(stays_U.nonzero()[:, 0], unit)


def drop_units(
    gram: Gram,
    prior_PQ: Tensor,
    keep: int,
    unit: int,
    ridge: float,
    dtype: torch.dtype = torch.float64,
    judging: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Drop in rounds what costs the refitted writer least, `tr(W_u^T [G^-1]_uu^-1 W_u)` for unit
    `u` (Hassibi and Stork 1993; `w^2 / [G^-1]_jj` for single neurons), until `keep` units are left.

    Between rounds weights and inverse of the survivors are brought up to date. Arguments are those
    of `select_units`; with `judging` the cost is that of the first so many outputs.

    Yields, for every round, the numbers of the units that go, those that cost least first, and how
    much the squared error of each output of the writer, refitted on those left, has grown since
    all were there, `(Q,)`. Raises NotFinite if the Gram holds NaN or infinity.
    """
    factor_PP, weight_PQ = _factor_and_writer(gram, prior_PQ, ridge, dtype)
    inverse_PP = torch.cholesky_inverse(factor_PP, out=factor_PP)  # in the factor's own place
    units = len(inverse_PP) // unit
    stays_U = torch.ones(units, dtype=torch.bool, device=inverse_PP.device)
    a_round, grown_Q = max(1, units // _ROUNDS), torch.zeros_like(weight_PQ[0])
    while (left := int(stays_U.sum())) > keep:
        loss_U = _losses(inverse_PP, weight_PQ[:, :judging], unit).masked_fill(~stays_U, torch.inf)
        gone_U = loss_U.argsort()[: min(left - keep, a_round)]
        gone_P = unit_members(gone_U, unit)
        # Rows and columns of those that go become zero: what is left is the inverse of the rest.
        rows_GP, weight_GQ = inverse_PP[gone_P], weight_PQ[gone_P]
        factor_GG = torch.linalg.cholesky(rows_GP[:, gone_P])
        grown_Q = grown_Q + (torch.cholesky_solve(weight_GQ, factor_GG) * weight_GQ).sum(0)
        across_GP = torch.cholesky_solve(rows_GP, factor_GG)
        weight_PQ.addmm_(across_GP.T, weight_GQ, alpha=-1)
        inverse_PP.addmm_(rows_GP.T, across_GP, alpha=-1)
        stays_U[gone_U] = False
        yield gone_U, grown_Q


def _factor_and_writer(
    gram: Gram, prior_PQ: Tensor, ridge: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The ridged Gram's Cholesky factor, and the writer that units are judged by."""
    factor_PP = None
    if dtype == torch.float32:
        factor_PP, penalty_P = float32_factor(gram.inputs_PP, ridge)
    if factor_PP is None:
        factor_PP, penalty_P, _ = ridged_factor(gram.inputs_PP, ridge)
    like = factor_PP.dtype
    others = (tensor.to(like) for tensor in (penalty_P, gram.cross_PQ, prior_PQ))
    return factor_PP, solve_towards(factor_PP, *others)


def _losses(inverse_PP: Tensor, weight_PQ: Tensor, unit: int) -> Tensor:
    """What each unit costs, `(U,)`; of one that has gone it means nothing."""
    if unit == 1:
        return weight_PQ.square().sum(1) / inverse_PP.diagonal()
    units = len(inverse_PP) // unit
    blocks_Uuu = inverse_PP.reshape(units, unit, units, unit).diagonal(dim1=0, dim2=2)
    # A unit that has gone has a block of zeros, which nothing can be divided by.
    factor_Uuu, _ = torch.linalg.cholesky_ex(blocks_Uuu.permute(2, 0, 1))
    weight_UuQ = weight_PQ.reshape(units, unit, -1)
    halves_UuQ = torch.linalg.solve_triangular(factor_Uuu, weight_UuQ, upper=False)
    return halves_UuQ.square().sum((1, 2))


def unit_members(units_U: Tensor, size: int) -> Tensor:
    """Indices of the members of units of `size` members each, `(U size,)`, unit after unit."""
    return (units_U[:, None] * size + torch.arange(size, device=units_U.device)).reshape(-1)
