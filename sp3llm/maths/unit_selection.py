"""Which neurons or KV groups a writer keeps (Hassibi and Stork 1993). Tensors only.

Shape suffixes: P inputs of the writer, Q outputs, U units, u inputs of a unit.
"""

import torch
from torch import Tensor

from sp3llm.maths.refit import ridged_factor


def select_units(
    gram_PP: Tensor,
    weight_PQ: Tensor,
    keep: int,
    unit: int,
    method: str,
    ridge: float = 0.0,
    steps: int = 16,
) -> Tensor:
    """Which units of a writer's input to keep: neurons (`unit` 1) or the heads of KV groups.

    `obs`: drop what costs the refitted writer least, `tr(W_u^T [G^-1]_uu^-1 W_u)` for unit `u`
    (Hassibi and Stork 1993; `w^2 / [G^-1]_jj` for single neurons), in `steps` rounds with the
    survivors' weights and inverse updated in between. `energy`: drop what contributes least by
    itself, `sum_j G_jj |W_j|^2`, which knows nothing of what survivors can take over.

    `gram_PP` is the Gram of the writer's input, `weight_PQ` the fitted writer, `ridge` relative to
    the mean diagonal. Returns
    the kept input indices, rising, `(keep * unit,)`.
    """
    units = len(gram_PP) // unit
    members_UP = torch.arange(len(gram_PP), device=gram_PP.device).reshape(units, unit)
    if method == "energy":
        score_P = gram_PP.diagonal() * weight_PQ.square().sum(1)
        kept_U = score_P.reshape(units, unit).sum(1).topk(keep).indices.sort().values
        return members_UP[kept_U].reshape(-1)
    inverse_PP, _, _ = ridged_factor(gram_PP, ridge)
    torch.cholesky_inverse(inverse_PP, out=inverse_PP)
    while len(members_UP) > keep:
        left = len(members_UP)
        blocks_Uuu = inverse_PP.reshape(left, unit, left, unit).diagonal(dim1=0, dim2=2)
        blocks_Uuu = blocks_Uuu.permute(2, 0, 1)
        weights_UuQ = weight_PQ.reshape(left, unit, -1)
        loss_U = (torch.linalg.solve(blocks_Uuu, weights_UuQ) * weights_UuQ).sum((1, 2))
        count = min(left - keep, max(1, (units - keep) // steps))
        order_U = loss_U.argsort()
        gone_P = _positions(order_U[:count], unit)
        stays_P = _positions(order_U[count:].sort().values, unit)
        members_UP = members_UP[order_U[count:].sort().values]
        across = torch.linalg.solve(inverse_PP[gone_P][:, gone_P], inverse_PP[gone_P][:, stays_P])
        weight_PQ = weight_PQ[stays_P] - across.T @ weight_PQ[gone_P]
        inverse_PP = inverse_PP[stays_P][:, stays_P] - inverse_PP[stays_P][:, gone_P] @ across
    return members_UP.reshape(-1)


def _positions(units_U: Tensor, unit: int) -> Tensor:
    offsets = torch.arange(unit, device=units_U.device)
    return (units_U[:, None] * unit + offsets).reshape(-1)
