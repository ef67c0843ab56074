"""Second moments of the residual stream and the basis they span. Tensors only.

Shape suffixes: N tokens, D residual width, K kept width.
"""

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# Products are taken in float32 over this many tokens and summed in float64: the error of a
# product does not grow with the number of tokens, and no float64 matrix product is needed.
_BLOCK = 4096
# Panels a symmetric product is taken in: 4 leave out three eighths of the work.
_PANELS = 4


def normalise(x_ND: Tensor, eps: float, centred: bool = False) -> Tensor:
    """The stream as a norm sees it before its own weight: `x / sqrt(mean(x^2) + eps)`, and for a
    LayerNorm (`centred`) with the mean over channels removed first.

    `x_ND` has shape `(..., D)`; the result is float32 (float64 for float64 input).
    """
    x_ND = widen(x_ND)
    if centred:
        x_ND = x_ND - x_ND.mean(-1, keepdim=True)
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)


def mean_free_frame(width: int, device: torch.device) -> Tensor:
    """Orthonormal columns orthogonal to the vector of ones, `(D, D - 1)`, float64: the cosines of
    the DCT-II but the constant one. No channel is singled out (DESIGN 3.4).
    """
    position_D1 = torch.arange(width, dtype=torch.float64, device=device)[:, None] + 0.5
    frequency_1F = torch.arange(1, width, dtype=torch.float64, device=device)[None]
    return math.sqrt(2 / width) * torch.cos(math.pi / width * position_D1 * frequency_1F)


def spreading_turn(width: int, device: torch.device) -> Tensor:
    """An orthogonal matrix without large entries, `(K, K)`, float64: turned by it, the energy of
    coordinates that differ much is spread over all of them.

    A Hadamard matrix (Sylvester's) of the largest power of two in `width`, times the DCT-II of the
    odd rest, so that every width has one; no entry exceeds `sqrt(2 / K)`. Its rows carry random
    signs, from a seed that is always the same: without them coordinates that have a common sign
    would add up in the first column (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456).
    """
    signs_K1 = _signs(width)[:, None]
    return (signs_K1 * _flat_matrix(width)).to(device)


def spread_mean_free_frame(width: int, device: torch.device) -> Tensor:
    """Like `mean_free_frame`, `(K, K - 1)`, with a turn inside of it: rows of the matrix behind
    `spreading_turn`, whose first row is constant, in place of cosines.
    """
    rows_FK = _flat_matrix(width)[1:]
    return (_signs(width - 1)[:, None] * rows_FK).T.to(device)


def _flat_matrix(width: int) -> Tensor:
    """Sylvester's Hadamard matrix times a DCT-II, orthogonal, its first row constant."""
    power = width & -width
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.kron(pair, matrix)
    odd = width // power
    index_O = torch.arange(odd)
    # Whole turns go before the cosine, where they would cost digits.
    quarters_OO = index_O[:, None] * (2 * index_O + 1) % (4 * odd)
    cosines_OO = math.sqrt(2 / odd) * torch.cos(math.pi / (2 * odd) * quarters_OO.double())
    cosines_OO[0] = 1 / math.sqrt(odd)
    return torch.kron(matrix / math.sqrt(power), cosines_OO)


def _signs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(0, 2, (count,), generator=generator).double() - 1


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def add_second_moment(total_DD: Tensor, x_ND: Tensor) -> None:
    """Add `sum_n x_n x_n^T` to the float64 `total_DD`, in place. `x_ND` is `(..., D)`, float."""
    rows_ND = x_ND.reshape(-1, x_ND.shape[-1])
    for block_ND in rows_ND.split(_BLOCK):
        total_DD += symmetric_product(block_ND, block_ND).to(total_DD)


def column_sums(x_NP: Tensor) -> Tensor:
    """`sum_n x_n`, `(P,)`, float64. By products with ones: reductions that widen are far slower."""
    total_P = torch.zeros(x_NP.shape[1], dtype=torch.float64, device=x_NP.device)
    for block_NP in x_NP.split(_BLOCK):
        total_P += block_NP.new_ones(len(block_NP)) @ block_NP
    return total_P


def symmetric_product(left_NP: Tensor, right_NP: Tensor) -> Tensor:
    """`left^T right`, `(P, P)`, where that is symmetric: only the blocks on and above the diagonal
    are computed. In the wider of the two dtypes, float32 at least.
    """
    size = right_NP.shape[1]
    wide = torch.promote_types(left_NP.dtype, right_NP.dtype)
    product_PP = right_NP.new_empty(size, size, dtype=torch.promote_types(wide, torch.float32))
    bounds = [size * panel // _PANELS for panel in range(_PANELS + 1)]
    for start, end in pairwise(bounds):
        product_PP[start:end, start:] = product(left_NP[:, start:end], right_NP[:, start:])
        product_PP[end:, start:end] = product_PP[start:end, end:].T
    return product_PP


def product(left_NP: Tensor, right_NQ: Tensor) -> Tensor:
    """`left^T right`, `(P, Q)`, in the wider of the two dtypes, float32 at least.

    On a GPU the operands go to its tensor cores as sums of bfloat16 numbers (`split_product`),
    which is an order of magnitude faster than float32 there.
    """
    wide = torch.promote_types(left_NP.dtype, right_NQ.dtype)
    if right_NQ.is_cuda and wide != torch.float64 and _has_mixed_products():
        return split_product(left_NP, right_NQ, _mixed_product)
    wide = torch.promote_types(wide, torch.float32)
    return left_NP.to(wide).T @ right_NQ.to(wide)


def split_product(
    left_NP: Tensor, right_NQ: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`left^T right` from products of bfloat16 operands, summed in float32 by `multiply`.

    A float32 number is the sum of two bfloat16 numbers to 2^-17 of itself; of the four products
    the least, 2^-16 of the first, is left out. Errors are random and average over tokens, where
    those of a plain bfloat16 product, 2^-9, are too large for a Gram matrix that is to be
    inverted. A bfloat16 operand is exact as it is.
    """
    lefts, rights = _pieces(left_NP), _pieces(right_NQ)
    total = multiply(lefts[0].T, rights[0])
    for low in lefts[1:]:
        total += multiply(low.T, rights[0])
    for low in rights[1:]:
        total += multiply(lefts[0].T, low)
    return total


def _pieces(x: Tensor) -> list[Tensor]:
    if x.dtype == torch.bfloat16:
        return [x]
    high = x.bfloat16()
    return [high, (x.float() - high.float()).bfloat16()]


def _mixed_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


@functools.cache
def _has_mixed_products() -> bool:
    """Whether this torch multiplies bfloat16 into float32 (2.8 and later do)."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)


def eigenbasis(moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, `(D,)`, and eigenvectors as columns, `(D, D)`, of a second moment.

    SP3 (arXiv 2308.16475) takes one such basis a layer; here it is one for the whole stream. In
    float64: float32 eigenvectors are known to cost SliceGPT a full point of perplexity on
    Llama-2-7B. The largest entry of every eigenvector is made positive, so that equal moments
    give equal bases.
    """
    symmetric_DD = (moment_DD + moment_DD.T) / 2
    values_D, vectors_DD = torch.linalg.eigh(symmetric_DD)
    values_D, vectors_DD = values_D.flip(0), vectors_DD.flip(1)
    largest_D = vectors_DD.abs().argmax(0, keepdim=True)
    signs_1D = torch.sign(vectors_DD.gather(0, largest_D))
    return values_D, vectors_DD * signs_1D


def tied_rotation(basis_DK: Tensor, norm_weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation inside the kept subspace that lets a tied head survive (DESIGN 3.5).

    `Z^T diag(g) Z = R diag(s) R^T`: with basis `Z R` the final norm's weight becomes a diagonal
    again, and one table serves embedding and head.

    Returns `Z R`, `(D, K)`, and `s`, `(K,)`, both float64.
    """
    basis_DK = basis_DK.double()
    inner_KK = basis_DK.T @ (norm_weight_D.double()[:, None] * basis_DK)
    s_K, r_KK = torch.linalg.eigh((inner_KK + inner_KK.T) / 2)
    return basis_DK @ r_KK, s_K


def metric_basis(
    moments_DD: tuple[Tensor, ...],
    metrics_DD: tuple[Tensor, ...],
    vectors_DD: Tensor,
    kept: int,
    steps: int = 60,
) -> Tensor:
    """The subspace of `kept` dimensions that loses least of what is read (DESIGN 3.2).

    PCA keeps what is large, not what is read. Minimises over projectors `Q = Y Y^T` onto what is
    given up the sum over sites of `tr(A Q C Q)`, `A` what an error costs there and `C` the
    stream's second moment: conjugate gradients on the Grassmann manifold (Edelman, Arias and
    Smith 1998) with a QR retraction, from the orthonormal `vectors_DD`, whose first `kept`
    columns are the start. It need not converge: the last steps change the cost, and not the
    model.

    Returns `Z`, `(D, K)`, float64, turned to the principal axes of the summed moments within the
    subspace, so that it does not depend on the path taken.
    """
    if kept == len(vectors_DD):
        return vectors_DD
    sites = list(zip(metrics_DD, moments_DD, strict=True))

    def cost_and_gradient(y_DR: Tensor) -> tuple[Tensor, Tensor]:
        cost, gradient_DR = y_DR.new_zeros(()), torch.zeros_like(y_DR)
        for a_DD, c_DD in sites:
            ay_DR, cy_DR = a_DD @ y_DR, c_DD @ y_DR
            yay_RR, ycy_RR = y_DR.T @ ay_DR, y_DR.T @ cy_DR
            cost = cost + (yay_RR * ycy_RR).sum()
            gradient_DR += 2 * (ay_DR @ ycy_RR + cy_DR @ yay_RR)
        return cost, _tangent(gradient_DR, y_DR)

    y_DR = vectors_DD[:, kept:]
    cost, gradient_DR = cost_and_gradient(y_DR)
    direction_DR = -gradient_DR
    step = 1.0 / gradient_DR.norm().clamp_min(1e-30)
    for _ in range(steps if gradient_DR.any() else 0):
        slope = (gradient_DR * direction_DR).sum()
        if slope >= 0:
            direction_DR, slope = -gradient_DR, -gradient_DR.square().sum()
        for _ in range(30):
            trial_DR = _retracted(y_DR + step * direction_DR)
            trial_cost, trial_gradient_DR = cost_and_gradient(trial_DR)
            if trial_cost <= cost + 1e-4 * step * slope:
                break
            step = step / 2
        else:
            break
        settled = cost - trial_cost < 1e-6 * cost
        change_DR = trial_gradient_DR - _tangent(gradient_DR, trial_DR)
        turn = (trial_gradient_DR * change_DR).sum() / gradient_DR.square().sum()
        direction_DR = turn.clamp_min(0) * _tangent(direction_DR, trial_DR) - trial_gradient_DR
        y_DR, cost, gradient_DR, step = trial_DR, trial_cost, trial_gradient_DR, step * 2
        if settled:
            break
    z_DK = torch.linalg.qr(y_DR, mode="complete")[0][:, y_DR.shape[1] :]
    total_DD = sum(moments_DD, torch.zeros_like(vectors_DD))
    _, turn_KK = eigenbasis(z_DK.T @ total_DD @ z_DK)
    return z_DK @ turn_KK


def _tangent(direction_DR: Tensor, y_DR: Tensor) -> Tensor:
    """The part of a direction that moves the subspace."""
    return direction_DR - y_DR @ (y_DR.T @ direction_DR)


def _retracted(y_DR: Tensor) -> Tensor:
    """Orthonormal columns of the same span, near those given: QR with a positive diagonal."""
    q_DR, r_RR = torch.linalg.qr(y_DR)
    return q_DR * torch.where(r_RR.diagonal() < 0, -1.0, 1.0).to(q_DR)
