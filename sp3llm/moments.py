"""Second moments of the residual stream and the basis they span. Tensors only.

Shape suffixes: N tokens, D residual width, K kept width.
"""

import torch
from torch import Tensor

# Products are taken in float32 over this many tokens and summed in float64: the error of a
# product does not grow with the number of tokens, and no float64 matrix product is needed.
_BLOCK = 4096


def normalise(x_ND: Tensor, eps: float) -> Tensor:
    """The stream as an RMSNorm sees it before its own weight: `x / sqrt(mean(x^2) + eps)`.

    `x_ND` has shape `(..., D)`; the result is float32 (float64 for float64 input).
    """
    x_ND = widen(x_ND)
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def add_second_moment(total_DD: Tensor, x_ND: Tensor) -> None:
    """Add `sum_n x_n x_n^T` to the float64 `total_DD`, in place. `x_ND` is `(..., D)`, float."""
    rows_ND = x_ND.reshape(-1, x_ND.shape[-1])
    for block_ND in rows_ND.split(_BLOCK):
        total_DD += (block_ND.T @ block_ND).to(total_DD)


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
    start_DK: Tensor,
    steps: int = 200,
) -> Tensor:
    """The subspace that loses least of what is read (DESIGN 3.2).

    PCA keeps what is large, not what is read. Minimises over rank-`K` projectors `P = Z Z^T` the
    sum over sites of `tr(A (I-P) C (I-P))`, `A` what an error costs there and `C` the stream's
    second moment, each site scaled so that `tr(A C) = 1`, by gradient descent with a QR
    retraction and a backtracking step from the PCA start.

    Returns `Z`, `(D, K)`, float64, turned to the principal axes of the summed moments within the
    subspace, so that it does not depend on the path taken.
    """
    traces = [(a * c).sum() for a, c in zip(metrics_DD, moments_DD, strict=True)]
    # A site where no error costs anything (a block that does nothing yet) has no say.
    sites = [
        (1 / trace, a, c)
        for trace, a, c in zip(traces, metrics_DD, moments_DD, strict=True)
        if trace > 0
    ]

    def cost_and_gradient(z_DK: Tensor) -> tuple[Tensor, Tensor]:
        cost, gradient_DK = torch.zeros_like(z_DK[0, 0]), torch.zeros_like(z_DK)
        for scale, a_DD, c_DD in sites:
            az_DK, cz_DK = scale * (a_DD @ z_DK), c_DD @ z_DK
            zaz_KK, zcz_KK = z_DK.T @ az_DK, z_DK.T @ cz_DK
            cost = cost + 1 - 2 * (az_DK * cz_DK).sum() + (zaz_KK * zcz_KK).sum()
            lost_DK = az_DK @ zcz_KK + cz_DK @ zaz_KK - c_DD @ az_DK
            lost_DK = lost_DK - scale * (a_DD @ cz_DK)
            gradient_DK = gradient_DK + 2 * lost_DK
        return cost, gradient_DK - z_DK @ (z_DK.T @ gradient_DK)

    z_DK = start_DK
    cost, gradient_DK = cost_and_gradient(z_DK)
    step = 1.0 / gradient_DK.norm().clamp_min(1e-30)
    for _ in range(steps):
        for _ in range(30):
            trial_DK = torch.linalg.qr(z_DK - step * gradient_DK)[0]
            trial_cost, trial_gradient_DK = cost_and_gradient(trial_DK)
            if trial_cost <= cost - 1e-4 * step * gradient_DK.square().sum():
                break
            step = step / 2
        else:
            break
        settled = cost - trial_cost < 1e-7 * cost
        z_DK, cost, gradient_DK, step = trial_DK, trial_cost, trial_gradient_DK, step * 2
        if settled:
            break
    inner_KK = sum((z_DK.T @ c_DD @ z_DK for c_DD in moments_DD), z_DK.new_zeros(()))
    _, turn_KK = eigenbasis(inner_KK)
    return z_DK @ turn_KK
