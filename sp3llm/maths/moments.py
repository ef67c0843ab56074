"""Second moments of the residual stream. Tensors only.

Shape suffixes: N tokens, D residual width, P columns.
"""

import torch
from torch import Tensor

from sp3llm.maths.products import product, symmetric_product, widen, widened

# Products are summed in float32 over this many tokens and in float64 beyond: the error of a
# product does not grow with the number of tokens, and no float64 matrix product is needed.
TOKENS_A_BLOCK = 4096
# Least mean square of a token's stream that its error is relative to: a token of zeros, as padding
# may be, then counts for something finite.
LEAST_MEAN_SQUARE = 1e-12


def normalise(x_ND: Tensor, eps: float, centred: bool = False) -> Tensor:
    """The stream as a norm sees it before its own weight: `x / sqrt(mean(x^2) + eps)`, and for a
    LayerNorm (`centred`) with the mean over channels removed first.

    `x_ND` has shape `(..., D)`; the result is float32 (float64 for float64 input).
    """
    x_ND = widened(x_ND)
    if centred:
        x_ND -= x_ND.mean(-1, keepdim=True)
    return x_ND.mul_(torch.rsqrt(mean_square(x_ND) + eps))


def root_mean_square(x_ND: Tensor, centred: bool = False) -> Tensor:
    """The scale at which a norm reads a token, `(..., 1)`, at least float32: `sqrt(mean(x^2))`, for
    a LayerNorm (`centred`) of what is left without the mean over channels; never zero.
    """
    x_ND = widen(x_ND)
    if centred:
        x_ND = x_ND - x_ND.mean(-1, keepdim=True)
    return mean_square(x_ND).clamp_min(LEAST_MEAN_SQUARE).sqrt()


def mean_square(x_ND: Tensor) -> Tensor:
    """Of every token, `(..., 1)`, in its dtype; no square of all is kept."""
    return torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square() / x_ND.shape[-1]


def add_second_moment(total_DD: Tensor, x_ND: Tensor) -> None:
    """Add `sum_n x_n x_n^T` to the float64 `total_DD`, in place. `x_ND` is `(..., D)`, float."""
    rows_ND = x_ND.reshape(-1, x_ND.shape[-1])
    for block_ND in rows_ND.split(TOKENS_A_BLOCK):
        total_DD += symmetric_product(block_ND, block_ND).to(total_DD)


def column_sums(x_NP: Tensor) -> Tensor:
    """`sum_n x_n`, `(P,)`, float64. By products with ones: reductions that widen are far slower."""
    total_P = torch.zeros(x_NP.shape[1], dtype=torch.float64, device=x_NP.device)
    for block_NP in x_NP.split(TOKENS_A_BLOCK):
        total_P += product(block_NP.new_ones(len(block_NP), 1), block_NP)[0]
    return total_P
