"""Turn a basis such that diagonal matrices stay diagonal in it (docs/design.md 3.15). Tensors only.

Shape suffixes: D residual width, K kept width, W norms whose weights are to survive.
"""

import math

import torch
from torch import Tensor

from sp3llm.maths.basis import mean_free_frame

# Evaluations of the search at most, and the change below which it ends.
_STEPS, _SETTLED = 150, 1e-12


def mean_keeping_basis(basis_DC: Tensor) -> Tensor:
    """`T = Z U^T + 1_D 1_K^T / sqrt(D K)`, `(D, K)`, float64, from orthonormal mean-free columns,
    `(D, K - 1)`: orthonormal columns that map ones to ones, so that times `sqrt(K / D)` the mean
    and the variance over channels of what lies in their span stay.
    """
    width, kept = basis_DC.shape[0], basis_DC.shape[1] + 1
    frame_KC = mean_free_frame(kept, basis_DC.device)
    return basis_DC @ frame_KC.T + 1 / math.sqrt(width * kept)


def diagonalising_turn(basis_DK: Tensor, weights_WD: Tensor) -> Tensor:
    """The basis, `(D, K)`, turned by the orthogonal `Q` that fixes ones and leaves least outside of
    the diagonals of `Q^T T^T diag(g) T Q`, summed over the weights `g`, by its square.

    All `K` dimensions of a full basis are turned to the channels, where nothing is left. Otherwise
    `Q` is a Cayley transform in the frame that is orthogonal to ones, found by L-BFGS; it need not
    converge. The start is what diagonalises one combination of the weights, that in which channels
    differ most: where there is a turn that diagonalises all, it is that.
    """
    width, kept = basis_DK.shape
    if kept == width:
        return torch.eye(width, dtype=basis_DK.dtype, device=basis_DK.device)
    # A factor common to a norm's weights is no reason to attend to it more.
    scale_W1 = weights_WD.square().mean(1, keepdim=True).sqrt()
    weights_WD = weights_WD / torch.where(scale_W1 > 0, scale_W1, torch.ones_like(scale_W1))
    basis_DK = basis_DK @ _start(basis_DK, weights_WD)
    inner_WKK = basis_DK.T @ (weights_WD[:, :, None] * basis_DK)
    frame_KC = mean_free_frame(kept, basis_DK.device)
    eye_CC = torch.eye(kept - 1, dtype=basis_DK.dtype, device=basis_DK.device)
    free_CC = torch.zeros_like(eye_CC, requires_grad=True)

    def turn() -> Tensor:
        skew_CC = free_CC - free_CC.T
        rotation_CC = torch.linalg.solve(eye_CC + skew_CC, eye_CC - skew_CC)
        return frame_KC @ rotation_CC @ frame_KC.T + 1 / kept

    def left_over() -> Tensor:
        search.zero_grad()
        turn_KK = turn()
        turned_WKK = turn_KK.T @ inner_WKK @ turn_KK
        diagonal_WK = turned_WKK.diagonal(dim1=1, dim2=2)
        left = turned_WKK.square().sum() - diagonal_WK.square().sum()
        left.backward()
        return left

    search = torch.optim.LBFGS(
        [free_CC],
        max_iter=_STEPS,
        max_eval=_STEPS,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_change=_SETTLED,
    )
    with torch.enable_grad():
        search.step(left_over)
    return basis_DK @ turn().detach()


def _start(basis_DK: Tensor, weights_WD: Tensor) -> Tensor:
    """The orthogonal matrix that fixes ones nearest to the eigenvectors of `T^T diag(g) T`, `g` the
    combination of the weights in which channels differ most, `(K, K)`.
    """
    centred_WD = weights_WD - weights_WD.mean(1, keepdim=True)
    combined_D = torch.linalg.eigh(centred_WD @ centred_WD.T)[1][:, -1] @ weights_WD
    vectors_KK = torch.linalg.eigh(basis_DK.T @ (combined_D[:, None] * basis_DK))[1]
    # Where ones are spread over all of them alike, as a turn that fixes ones has it.
    sums_K = vectors_KK.sum(0)
    vectors_KK = vectors_KK * torch.where(sums_K < 0, -1.0, 1.0).to(vectors_KK)
    ones_K = torch.full_like(sums_K, 1 / math.sqrt(len(sums_K)))
    found_K = vectors_KK.T @ ones_K
    return vectors_KK @ _plane_rotation(ones_K, found_K)


def _plane_rotation(from_K: Tensor, to_K: Tensor) -> Tensor:
    """The rotation, in the plane of two unit vectors that are not opposed, that takes one to the
    other, `(K, K)`.
    """
    both_K = from_K + to_K
    eye_KK = torch.eye(len(from_K), dtype=from_K.dtype, device=from_K.device)
    halved_KK = torch.outer(both_K, both_K) / (1 + from_K @ to_K)
    return eye_KK - halved_KK + 2 * torch.outer(to_K, from_K)


def diagonal_in(basis_DK: Tensor, weight_D: Tensor) -> Tensor:
    """The diagonal of `T^T diag(g) T`, `(K,)`."""
    return (basis_DK * (weight_D[:, None] * basis_DK)).sum(0)
