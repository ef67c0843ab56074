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
