"""Bases of the residual stream and frames of it. Tensors only.

Shape suffixes: D residual width, C coordinates of a frame, K kept width, R given up.
"""

import math

import torch
from torch import Tensor

from sp3llm.maths.products import multiply

# Of the search for the subspace that costs least (`metric_basis`): steps at most; how often a step
# is halved; the share of the promised decrease that a step must bring (Armijo's rule); and the
# relative decrease below which, twice in a row, the search ends, where the model no longer changes.
# Once is not enough: a step that was halved many times brings little, and the next may bring much.
_STEPS = 60
_HALVINGS = 30
_SUFFICIENT_DECREASE = 1e-4
_SETTLED = 1e-6
# Below any gradient's norm: none is divided by zero.
_LEAST_NORM = 1e-30


def mean_free_frame(width: int, device: torch.device) -> Tensor:
    """Orthonormal columns orthogonal to the vector of ones, `(D, D - 1)`, float64: the cosines of
    the DCT-II but the constant one. No channel is singled out (docs/design.md 3.4).
    """
    position_D1 = torch.arange(width, dtype=torch.float64, device=device)[:, None] + 0.5
    frequency_1F = torch.arange(1, width, dtype=torch.float64, device=device)[None]
    return math.sqrt(2 / width) * torch.cos(math.pi / width * position_D1 * frequency_1F)


def spreading_rotation(width: int, device: torch.device) -> Tensor:
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
    `spreading_rotation`, whose first row is constant, in place of cosines.
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
    """Random signs, 1 or -1, always the same, `(count,)`, float64."""
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(0, 2, (count,), generator=generator).double() - 1


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
    """The rotation inside the kept subspace that lets a tied head survive (docs/design.md 3.5).

    `Z^T diag(g) Z = R diag(s) R^T`: with basis `Z R` the final norm's weight becomes a diagonal
    again, and one table serves embedding and head. All channels as they are have one already.

    Returns `Z R`, `(D, K)`, and `s`, `(K,)`, both float64.
    """
    basis_DK = basis_DK.double()
    if is_identity(basis_DK):
        return basis_DK, norm_weight_D.double()
    inner_KK = basis_DK.T @ (norm_weight_D.double()[:, None] * basis_DK)
    s_K, r_KK = torch.linalg.eigh((inner_KK + inner_KK.T) / 2)
    return basis_DK @ r_KK, s_K


def is_identity(basis_DK: Tensor) -> bool:
    """Whether a basis is the coordinates that there are, all of them in their order."""
    width, kept = basis_DK.shape
    return width == kept and torch.equal(basis_DK, torch.eye(width).to(basis_DK))


def metric_basis(
    moments_DD: tuple[Tensor, ...],
    metrics_DD: tuple[Tensor, ...],
    vectors_DD: Tensor,
    kept: int,
    steps: int = _STEPS,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The subspace of `kept` dimensions that loses least of what is read (docs/design.md 3.2).

    PCA keeps what is large, not what is read. Minimises over projectors `Q = Y Y^T` onto what is
    given up the sum over sites of `tr(A Q C Q)`, `A` what an error costs there and `C` the
    stream's second moment: conjugate gradients on the Grassmann manifold (Edelman, Arias and
    Smith 1998) with a QR retraction, from the orthonormal `vectors_DD`, whose first `kept`
    columns are the start. It need not converge: the last steps change the cost, and not the
    model. Nor need its products be exact: `dtype` is that of the steps.

    Returns `Z`, `(D, K)`, float64, turned to the principal axes of the summed moments within the
    subspace, so that it does not depend on the path taken.
    """
    if kept == len(vectors_DD):
        return vectors_DD
    sites = [
        (a_DD.to(dtype), c_DD.to(dtype)) for a_DD, c_DD in zip(metrics_DD, moments_DD, strict=True)
    ]

    def cost_and_gradient(y_DR: Tensor) -> tuple[Tensor, Tensor]:
        # Summed in float64: what a step gains is far less than a float32 sum can tell.
        cost = torch.zeros((), dtype=torch.float64, device=y_DR.device)
        gradient_DR = torch.zeros_like(y_DR)
        for a_DD, c_DD in sites:
            ay_DR, cy_DR = multiply(a_DD, y_DR), multiply(c_DD, y_DR)
            yay_RR, ycy_RR = multiply(y_DR.T, ay_DR), multiply(y_DR.T, cy_DR)
            cost += (yay_RR * ycy_RR).sum(dtype=torch.float64)
            gradient_DR += 2 * (multiply(ay_DR, ycy_RR) + multiply(cy_DR, yay_RR))
        return cost, _tangent(gradient_DR, y_DR)

    y_DR = vectors_DD[:, kept:].to(dtype)
    cost, gradient_DR = cost_and_gradient(y_DR)
    direction_DR = -gradient_DR
    step, idle = 1.0 / gradient_DR.norm().clamp_min(_LEAST_NORM), 0
    for _ in range(steps if gradient_DR.any() else 0):
        slope = (gradient_DR * direction_DR).sum()
        if slope >= 0:
            direction_DR, slope = -gradient_DR, -gradient_DR.square().sum()
        for _ in range(_HALVINGS):
            trial_DR = _retracted(y_DR + step * direction_DR)
            trial_cost, trial_gradient_DR = cost_and_gradient(trial_DR)
            if trial_cost <= cost + _SUFFICIENT_DECREASE * step * slope:
                break
            step = step / 2
        else:
            break
        idle = idle + 1 if cost - trial_cost < _SETTLED * cost else 0
        change_DR = trial_gradient_DR - _tangent(gradient_DR, trial_DR)
        momentum = (trial_gradient_DR * change_DR).sum() / gradient_DR.square().sum()
        direction_DR = momentum.clamp_min(0) * _tangent(direction_DR, trial_DR) - trial_gradient_DR
        y_DR, cost, gradient_DR, step = trial_DR, trial_cost, trial_gradient_DR, step * 2
        if idle == 2:
            break
    z_DK = torch.linalg.qr(y_DR.double(), mode="complete")[0][:, y_DR.shape[1] :]
    total_DD = sum(moments_DD, torch.zeros_like(vectors_DD))
    _, axes_KK = eigenbasis(z_DK.T @ total_DD @ z_DK)
    return z_DK @ axes_KK


def _tangent(direction_DR: Tensor, y_DR: Tensor) -> Tensor:
    """The part of a direction, `(D, R)`, that is orthogonal to the columns of `y`: the rest only
    turns them within the subspace that they span.
    """
    return direction_DR - multiply(y_DR, multiply(y_DR.T, direction_DR))


def _retracted(x_DR: Tensor) -> Tensor:
    """Orthonormal columns of the same span, near those given, which are orthonormal ones and a
    tangent direction: QR with a positive diagonal, by the Cholesky factor of `X^T X`, which is at
    least the identity.
    """
    factor_RR = torch.linalg.cholesky(x_DR.T @ x_DR)
    return torch.linalg.solve_triangular(factor_RR, x_DR.T, upper=False).T


def stream_scale(basis_DK: Tensor) -> float:
    """`c = sqrt(K / D)`, the scale of the new stream, from the basis, `(D, K)`."""
    return math.sqrt(basis_DK.shape[1] / basis_DK.shape[0])
