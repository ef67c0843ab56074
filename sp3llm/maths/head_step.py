"""One step of a language model's head towards what another model says. Tensors only.

Shape suffixes: N tokens, V the vocabulary, E columns of the head's matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sp3llm.maths.losses import rows_at_once
from sp3llm.maths.moments import add_second_moment, column_sums
from sp3llm.maths.products import widen

# Tokens' worth of both models alike: a token that neither expects gets no bias,
_PRIOR_TOKENS = 3.0
# and one that is expected a few times has too few places to tell by where else it belongs.
_CAUTION_TOKENS = 30.0
# Ridges, in mean squares of what the head reads, and of that about its mean: a constant hardly
# needs the directions below the first one; of directions within the second the step is damped.
_RIDGE_OF_CONSTANT, _RIDGE_OF_STEP = 0.01, 3.0
# Of one, what the direction that is next to it comes to in the mean; with less, it is none.
_CONSTANT_ENOUGH = 0.9
# Rows taken at once, in numbers: in float64 a whole table is large, and a CPU's caches hold these.
_PIECE = 1 << 21


@dataclass(frozen=True)
class HeadSums:
    """Sums over tokens of what the head of a model reads, and of what it and another say."""

    moment_EE: Tensor
    """Of what it reads times itself, float64."""
    read_E: Tensor
    """Of what it reads, float64."""
    said_V: Tensor
    """Of its distributions, float64."""
    wanted_V: Tensor
    """Of the other model's."""
    said_VE: Tensor
    """Of its distributions times what it reads, float32."""
    wanted_VE: Tensor
    """Of the other model's."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(vars(self).values())


def no_tokens(vocabulary: int, columns: int, device: torch.device) -> HeadSums:
    """Sums of none."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return HeadSums(
        moment_EE=zeros(columns, columns),
        read_E=zeros(columns),
        said_V=zeros(vocabulary),
        wanted_V=zeros(vocabulary),
        said_VE=zeros(vocabulary, columns, dtype=torch.float32),
        wanted_VE=zeros(vocabulary, columns, dtype=torch.float32),
    )


def add_to_head(sums: HeadSums, read_NE: Tensor, said_NV: Tensor, wanted_NV: Tensor) -> None:
    """Add tokens, in place: what the head reads, and the logits of both models, of any dtype.

    Where what it reads is bfloat16, so are the distributions that it is multiplied by, and each
    product before it is added: an error of 2^-9 of that at most, which averages out, and is far
    less than what other tokens would make of it.
    """
    add_second_moment(sums.moment_EE, read_NE)
    sums.read_E.add_(column_sums(read_NE))
    is_rounded = read_NE.dtype == torch.bfloat16
    read_NE = read_NE if is_rounded else read_NE.float()
    of_both = (
        (said_NV, sums.said_V, sums.said_VE),
        (wanted_NV, sums.wanted_V, sums.wanted_VE),
    )
    for logits_NV, total_V, total_VE in of_both:
        shares_NV = torch.empty_like(logits_NV, dtype=read_NE.dtype)
        # A GPU has room for more, and is slow to be told.
        rows, step = rows_at_once(logits_NV), _rows(total_VE) * (16 if total_VE.is_cuda else 1)
        for piece_NV, place_NV in zip(logits_NV.split(rows), shares_NV.split(rows), strict=True):
            wide_NV = widen(piece_NV).softmax(-1)
            total_V.add_(wide_NV.sum(0))
            place_NV.copy_(wide_NV)
        for place_RE, shares_NR in zip(total_VE.split(step), shares_NV.split(step, 1), strict=True):
            if is_rounded:
                place_RE.add_(shares_NR.T @ read_NE)
            else:
                place_RE.addmm_(shares_NR.T, read_NE)


def stepped_head(table_VE: Tensor, sums: HeadSums, divisor: float = 1.0) -> Tensor:
    """The head's matrix, of a model whose logits are its products over `divisor`, one step nearer
    to what the other model says; in its own dtype.

    Logits first get biases, by which every token is expected as often as it is wanted: a step of
    iterative scaling (Darroch and Ratcliff 1972). A matrix takes them along the direction by which
    what it reads is nearest to one, if that is near enough. What is left of the divergence's
    gradient is then divided by its curvature as Kronecker factors have it (Martens and Grosse
    2015): the second moment of what is read, about its mean, and how often a token is expected.
    """
    count = sums.said_V.sum()
    mean_E = sums.read_E / count
    moment_EE = sums.moment_EE / count
    constant_E = torch.linalg.solve(_ridged(moment_EE, _RIDGE_OF_CONSTANT), mean_E)
    biases_V = ((sums.wanted_V + _PRIOR_TOKENS) / (sums.said_V + _PRIOR_TOKENS)).log()
    if mean_E @ constant_E < _CONSTANT_ENOUGH:
        biases_V, mean_E = torch.zeros_like(biases_V), torch.zeros_like(mean_E)
    covariance_EE = moment_EE - torch.outer(mean_E, mean_E)
    inverse_EE = torch.linalg.inv(_ridged(covariance_EE, _RIDGE_OF_STEP))

    stepped_VE = torch.empty_like(table_VE)
    step = _rows(table_VE)
    for start in range(0, len(table_VE), step):
        rows = slice(start, start + step)
        scale_R1 = biases_V[rows, None].exp()
        said_R1 = scale_R1 * sums.said_V[rows, None]
        wanted_R1 = sums.wanted_V[rows, None]
        gradient_RE = sums.wanted_VE[rows] - scale_R1 * sums.said_VE[rows]
        gradient_RE -= (wanted_R1 - said_R1) * mean_E
        turned_RE = gradient_RE / (said_R1 + _CAUTION_TOKENS) @ inverse_EE
        # Turned about the mean of what is read: a step that is a bias as well takes that back.
        along_R1 = biases_V[rows, None] - (turned_RE @ mean_E)[:, None]
        change_RE = divisor * (turned_RE + along_R1 * constant_E)
        stepped_VE[rows] = (table_VE[rows].double() + change_RE.to(table_VE.device)).to(
            table_VE.dtype
        )
    return stepped_VE


def _rows(table_VE: Tensor) -> int:
    """Rows of a head's matrix that are taken at once."""
    return max(1, _PIECE // table_VE.shape[1])


def _ridged(square_EE: Tensor, ridge: float) -> Tensor:
    """A second moment with a share of its mean diagonal added to its diagonal."""
    return square_EE + ridge * square_EE.diagonal().mean() * torch.eye(
        len(square_EE), dtype=square_EE.dtype, device=square_EE.device
    )
