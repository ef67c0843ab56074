"""Which neurons or KV groups a writer keeps (Hassibi and Stork 1993). Tensors only.

Shape suffixes: P inputs of the writer, Q outputs, U units, u inputs of a unit.
"""

import torch
from torch import Tensor

from sp3llm.maths.refit import Gram, ridged_factor, solve_towards

# Rounds that units are dropped in: with the survivors brought up to date in between, a few are as
# good as one unit at a time.
_ROUNDS = 16


def select_units(
    gram: Gram, prior_PQ: Tensor, keep: int, unit: int, method: str, ridge: float
) -> Tensor:
    """Which units of a writer's input to keep: neurons (`unit` 1) or the heads of KV groups.

    The writer `W` that they are judged by is the ridge regression of `gram`, `ridge` relative to
    the mean diagonal, that shrinks towards `prior_PQ`, without an intercept.

    `obs`: drop what costs the refitted writer least, `tr(W_u^T [G^-1]_uu^-1 W_u)` for unit `u`
    (Hassibi and Stork 1993; `w^2 / [G^-1]_jj` for single neurons), in rounds with the survivors'
    weights and inverse updated in between. `energy`: drop what contributes least by itself,
    `sum_j G_jj |W_j|^2`, which knows nothing of what survivors can take over.

    Returns the kept input indices, rising, `(keep * unit,)`. Raises NotFinite if the Gram holds
    NaN or infinity.
    """
    factor_PP, scale, ridge = ridged_factor(gram.inputs_PP, ridge)
    weight_PQ = solve_towards(factor_PP, ridge * scale.item(), gram.cross_PQ, prior_PQ)
    units = len(factor_PP) // unit
    members_UP = torch.arange(len(factor_PP), device=factor_PP.device).reshape(units, unit)
    if method == "energy":
        score_P = gram.inputs_PP.diagonal() * weight_PQ.square().sum(1)
        kept_U = score_P.reshape(units, unit).sum(1).topk(keep).indices.sort().values
        return members_UP[kept_U].reshape(-1)
    inverse_PP = torch.cholesky_inverse(factor_PP, out=factor_PP)  # in the factor's own place
    while len(members_UP) > keep:
        left = len(members_UP)
        blocks_Uuu = inverse_PP.reshape(left, unit, left, unit).diagonal(dim1=0, dim2=2)
        blocks_Uuu = blocks_Uuu.permute(2, 0, 1)
        weights_UuQ = weight_PQ.reshape(left, unit, -1)
        loss_U = (torch.linalg.solve(blocks_Uuu, weights_UuQ) * weights_UuQ).sum((1, 2))
        count = min(left - keep, max(1, (units - keep) // _ROUNDS))
        order_U = loss_U.argsort()
        gone_P = unit_members(order_U[:count], unit)
        stays_U = order_U[count:].sort().values
        stays_P = unit_members(stays_U, unit)
        members_UP = members_UP[stays_U]
        across = torch.linalg.solve(inverse_PP[gone_P][:, gone_P], inverse_PP[gone_P][:, stays_P])
        weight_PQ = weight_PQ[stays_P] - across.T @ weight_PQ[gone_P]
        inverse_PP = inverse_PP[stays_P][:, stays_P] - inverse_PP[stays_P][:, gone_P] @ across
    return members_UP.reshape(-1)


def unit_members(units_U: Tensor, size: int) -> Tensor:
    """Indices of the members of units of `size` members each, `(U size,)`, unit after unit."""
    return (units_U[:, None] * size + torch.arange(size, device=units_U.device)).reshape(-1)
