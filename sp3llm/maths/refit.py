"""Closed-form refit: ridge regressions from Gram matrices (docs/design.md 3.7). Tensors only.

Cutting is not the end. Every matrix is fitted again to what the small model really sees: readers
of a site share one map from the small stream to the dense one, writers chase the dense stream
with the errors made so far. Only Gram matrices are kept, so memory does not grow with the text.

Shape suffixes: N tokens, P inputs, Q outputs, D and K residual width before and after, F the
width that a writer reads.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp3llm.maths.moments import TOKENS_A_BLOCK
from sp3llm.maths.products import product, rounded_products, symmetric_product, widened

# What a ridge of zero is raised to first: above float64's epsilon, below which nothing changes.
_LEAST_RAISED_RIDGE = 1e-15
# A solution by a float32 factor is good enough where no more than this share of the right side is
# left: far less than bfloat16, which such solutions are rounded to, can tell. It is measured on so
# many random combinations of the outputs, and mended by so many steps at most.
_RESIDUAL, _PROBES, _REFINEMENTS = 1e-6, 8, 2
# Relative to the mean of the inputs' mean squares: the least that an input's penalty goes by.
_LEAST_SQUARE = 1e-6


class NotFinite(ArithmeticError):  # noqa: N818  (says what the numbers are)
    """A Gram matrix holds NaN or infinity, so that nothing can be fitted to it."""


@dataclass(frozen=True)
class Gram:
    """Everything a linear least-squares fit of `y ~ a X + b` needs, summed over tokens.

    All float64, on one device, added to in place.
    """

    inputs_PP: Tensor
    """`sum w a a^T`."""
    cross_PQ: Tensor
    """`sum w a y^T`."""
    input_sum_P: Tensor
    """`sum w a`."""
    target_sum_Q: Tensor
    """`sum w y`."""
    energy: Tensor
    """`sum w |y|^2`, scalar."""
    weight: Tensor
    """`sum w`, scalar."""


def empty_gram(inputs: int, outputs: int, device: torch.device) -> Gram:
    """A Gram of no tokens."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return Gram(
        zeros(inputs, inputs),
        zeros(inputs, outputs),
        zeros(inputs),
        zeros(outputs),
        zeros(),
        zeros(),
    )


def gram_of_writer(square_PP: Tensor, weight_PQ: Tensor) -> Gram:
    """The Gram of inputs with the second moment `square` and what a writer makes of them, which so
    is its least-squares solution; inputs are taken as free of a mean.
    """
    cross_PQ = square_PP @ weight_PQ
    return Gram(
        square_PP,
        cross_PQ,
        torch.zeros_like(square_PP[0]),
        torch.zeros_like(weight_PQ[0]),
        (cross_PQ * weight_PQ).sum(),
        torch.ones_like(square_PP[0, 0]),
    )


def add_to_gram(gram: Gram, a_NP: Tensor, y_NQ: Tensor, weight_N: Tensor | None = None) -> None:
    """Add tokens, in place. `a` is `(..., P)`, `y` `(..., Q)`, `weight` `(...)`, all floating.

    Sums over blocks of tokens are float32 (float64 for float64 input), those over blocks float64.
    Where `a` is bfloat16, so is what is multiplied: a token's numbers, its targets among them, are
    rounded to it once, after they were multiplied by the root of its weight. The Gram is then
    exactly that of the rounded tokens, positive semidefinite like any other; against the Gram of
    the tokens as they were it has, beside noise that averages out, some three millionths of
    its diagonal more.
    """
    a_NP, y_NQ = a_NP.reshape(-1, a_NP.shape[-1]), y_NQ.reshape(-1, y_NQ.shape[-1])
    weights = None if weight_N is None else weight_N.reshape(-1).split(TOKENS_A_BLOCK)
    blocks = zip(a_NP.split(TOKENS_A_BLOCK), y_NQ.split(TOKENS_A_BLOCK), strict=True)
    for index, (block_NP, block_NQ) in enumerate(blocks):
        weight_N = None if weights is None else weights[index]
        if block_NP.dtype == torch.bfloat16:
            _add_rounded(gram, block_NP, block_NQ, weight_N)
            continue
        weighted_NP, squares_N = block_NP, block_NQ.square().sum(1)
        if weight_N is None:
            weight_N = torch.ones_like(squares_N)
        else:
            weighted_NP = block_NP * weight_N[:, None]
        gram.inputs_PP.add_(symmetric_product(weighted_NP, block_NP))
        gram.cross_PQ.add_(product(weighted_NP, block_NQ))
        gram.input_sum_P.add_(weight_N @ block_NP.to(weight_N))
        gram.target_sum_Q.add_(weight_N @ block_NQ)
        gram.energy.add_((weight_N * squares_N).sum(dtype=torch.float64))
        gram.weight.add_(weight_N.sum(dtype=torch.float64))


def _add_rounded(gram: Gram, a_NP: Tensor, y_NQ: Tensor, weight_N: Tensor | None) -> None:
    """Add a block of tokens of which products are taken in bfloat16; see `add_to_gram`."""
    if weight_N is None:
        root_N = a_NP.new_ones(len(a_NP), dtype=torch.float32)
    else:
        root_N = weight_N.float().sqrt()
        # Widened first: of two dtypes a CPU multiplies a tenth as fast.
        a_NP, y_NQ = (widened(tokens).mul_(root_N[:, None]) for tokens in (a_NP, y_NQ))
    sums = (gram.inputs_PP, gram.cross_PQ, gram.input_sum_P, gram.target_sum_Q, gram.energy)
    for total, more in zip(sums, rounded_products(a_NP, y_NQ, root_N), strict=True):
        total.add_(more)
    gram.weight.add_(root_N.square().sum(dtype=torch.float64))


def gram_tensors(gram: Gram) -> tuple[Tensor, ...]:
    """The tensors of a Gram, for whoever sums them over processes."""
    return tuple(getattr(gram, name) for name in Gram.__dataclass_fields__)


def add_gram_(one: Gram, two: Gram) -> Gram:
    """Add the tokens of `two` to `one`, in place: the largest shapes leave no room for a third."""
    for mine, other in zip(gram_tensors(one), gram_tensors(two), strict=True):
        mine.add_(other)
    return one


def sum_grams(one: Gram, two: Gram) -> Gram:
    """The Gram of both sets of tokens."""
    return Gram(
        *(mine + other for mine, other in zip(gram_tensors(one), gram_tensors(two), strict=True))
    )


def schur_complement(gram: Gram, kept_P: Tensor, ridge: float) -> Gram:
    """The Gram of some inputs, the others regressed out of inputs and targets: what a choice among
    the first sees where the others stay and take over what they can. Its least-squares solution is
    their part of the joint one. `kept_P` are indices, `ridge` as for `ridged_factor`.
    """
    others_P = torch.ones(len(gram.inputs_PP), dtype=torch.bool, device=kept_P.device)
    others_P[kept_P] = False
    across_OP = gram.inputs_PP[others_P][:, kept_P]
    factor_OO, _, _ = ridged_factor(gram.inputs_PP[others_P][:, others_P], ridge)
    shares_OP = solve_(factor_OO, across_OP.clone())
    part = restricted(gram, kept_P)
    return replace(
        part,
        inputs_PP=part.inputs_PP - across_OP.T @ shares_OP,
        cross_PQ=part.cross_PQ - shares_OP.T @ gram.cross_PQ[others_P],
    )


def squared_error(gram: Gram, solution_PQ: Tensor, intercept_Q: Tensor | None) -> float:
    """`sum w |y - a X - b|^2` over the Gram's tokens, divided by `sum w |y|^2`."""
    # `tr X^T (G X - 2 C)`, the product turned so that a solution in columns needs no copy.
    rest_QP = solution_PQ.mT @ gram.inputs_PP
    rest_QP.sub_(gram.cross_PQ.mT, alpha=2)
    error = gram.energy + torch.dot(rest_QP.view(-1), solution_PQ.mT.reshape(-1))
    if intercept_Q is not None:
        mean_Q = gram.input_sum_P @ solution_PQ
        error = error + 2 * intercept_Q @ (mean_Q - gram.target_sum_Q)
        error = error + gram.weight * intercept_Q.square().sum()
    return (error / gram.energy.clamp_min(torch.finfo(torch.float64).tiny)).item()


def ridged_factor(
    gram_PP: Tensor, ridge: float, by_input: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Cholesky factor of `G + Lambda`, the diagonal `Lambda`, `(P,)`, and the relative ridge used.

    `Lambda` is `ridge` times the mean of the diagonal of `G`, or `by_input` times each entry of it
    (`_squares`). Where the matrix is not positive definite to working precision the ridge is raised
    tenfold until it is. `gram_PP` stays as it is; the factor takes the only other matrix of its
    size.

    Raises NotFinite if `gram_PP` holds NaN or infinity, which no ridge makes positive definite.
    """
    check_finite(gram_PP)
    squares_P = _squares(gram_PP, by_input)
    largest = squares_P.max().item()
    # In columns, as LAPACK has it: in rows it would be copied there and back.
    factor_PP = torch.empty_like(gram_PP).mT
    info = torch.empty((), dtype=torch.int32, device=gram_PP.device)
    while math.isfinite((1 + ridge) * largest):
        factor_PP.copy_(gram_PP)
        factor_PP.diagonal().add_(ridge * squares_P)
        torch.linalg.cholesky_ex(factor_PP, out=(factor_PP, info))
        if info.item() == 0:
            return factor_PP, ridge * squares_P, ridge
        ridge = max(10 * ridge, _LEAST_RAISED_RIDGE)
    raise NotFinite("No finite ridge makes the Gram matrix positive definite.")


def _squares(gram_PP: Tensor, by_input: bool) -> Tensor:
    """The mean of a Gram matrix's diagonal, for every input; or by input that diagonal, each entry
    at least a millionth of the mean: an input that hardly ever fires is not to be free. Of a matrix
    of zeros, inputs that never do, 1.
    """
    diagonal_P = gram_PP.diagonal()
    mean = (diagonal_P / len(diagonal_P)).sum()  # of finite numbers the sum alone can overflow
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    if not by_input:
        return mean.expand_as(diagonal_P)
    return torch.maximum(diagonal_P, _LEAST_SQUARE * mean)


def solve_(factor_PP: Tensor, right_PQ: Tensor) -> Tensor:
    """`(L L^T)^-1 right`; `right` may be overwritten. `cholesky_solve` would copy the factor, which
    at the largest shapes is gigabytes.
    """
    in_columns_PQ = right_PQ.mT.contiguous().mT
    torch.linalg.solve_triangular(factor_PP, in_columns_PQ, upper=False, out=in_columns_PQ)
    torch.linalg.solve_triangular(factor_PP.mT, in_columns_PQ, upper=True, out=in_columns_PQ)
    return in_columns_PQ


def solve_towards(
    factor_PP: Tensor, penalty_P: Tensor, cross_PQ: Tensor, prior_PQ: Tensor
) -> Tensor:
    """`(G + Lambda)^-1 (C + Lambda X_0)`, `(P, Q)`: the ridge regression that shrinks towards
    `prior_PQ`, from the Cholesky factor of `G + Lambda`; `penalty_P` is the diagonal of `Lambda`.
    """
    return solve_(factor_PP, torch.addcmul(cross_PQ, penalty_P[:, None], prior_PQ))


def ridge_solution(
    gram: Gram,
    prior_PQ: Tensor,
    ridge: float,
    intercept: bool,
    dtype: torch.dtype = torch.float64,
    by_input: bool = False,
) -> tuple[Tensor, Tensor | None, float]:
    """`argmin_X sum w |y - a X - b|^2 + |Lambda^1/2 (X - prior)|^2`, `b` unpenalised, by Cholesky.

    `Lambda` is `ridge` times the mean diagonal of `sum w a a^T` (centred if there is an intercept),
    which is the same however the inputs are turned; or `by_input` the diagonal itself: each input
    is penalised by its own mean square, and what it is multiplied with makes no difference. Real
    models have neurons thousands of times larger than others, which would set the penalty for all,
    and which no turn mixes. Where the matrix is
    not positive definite to working precision the ridge is raised tenfold until it is. The factor
    is float64; or, with `dtype` float32, that, where what it leaves of the equation shows that it
    is good enough (`_by_float32_factor`).

    Returns `X`, `b` (None without intercept) and the ridge used. Raises NotFinite if the Gram's
    matrix of the inputs holds NaN or infinity.
    """
    inputs_PP, cross_PQ = gram.inputs_PP, gram.cross_PQ
    if intercept:
        mean_P, mean_Q = gram.input_sum_P / gram.weight, gram.target_sum_Q / gram.weight
        inputs_PP = torch.addr(inputs_PP, gram.input_sum_P, mean_P, alpha=-1)
        cross_PQ = torch.addr(cross_PQ, gram.input_sum_P, mean_Q, alpha=-1)
    solution_PQ = None
    if dtype == torch.float32:
        solution_PQ = _by_float32_factor(inputs_PP, cross_PQ, prior_PQ, ridge, by_input)
    if solution_PQ is None:
        factor_PP, penalty_P, ridge = ridged_factor(inputs_PP, ridge, by_input)
        solution_PQ = solve_towards(factor_PP, penalty_P, cross_PQ, prior_PQ)
    return solution_PQ, mean_Q - mean_P @ solution_PQ if intercept else None, ridge


def _by_float32_factor(
    inputs_PP: Tensor, cross_PQ: Tensor, prior_PQ: Tensor, ridge: float, by_input: bool
) -> Tensor | None:
    """`solve_towards` by a Cholesky factor in float32, refined until what is left of the equation
    is small; None: it is not, or there is no such factor.
    """
    factor_PP, penalty_P = float32_factor(inputs_PP, ridge, by_input)
    if factor_PP is None:
        return None
    penalty_P1 = penalty_P[:, None]
    right_PQ = torch.addcmul(cross_PQ, penalty_P1, prior_PQ)
    # What is left is weighed as the inputs are, such that small ones count as much as large ones.
    weight_P1 = (inputs_PP.diagonal() + penalty_P).rsqrt()[:, None]
    outputs = right_PQ.shape[1]
    generator = torch.Generator().manual_seed(outputs)
    signs_QS = torch.randint(2, (outputs, min(_PROBES, outputs)), generator=generator) * 2 - 1
    signs_QS = signs_QS.to(right_PQ)
    wanted = (weight_P1 * (right_PQ @ signs_QS)).norm()

    def left_of(solution_PQ: Tensor, right_PQ: Tensor) -> Tensor:
        return right_PQ - inputs_PP @ solution_PQ - penalty_P1 * solution_PQ

    solution_PQ = solve_(factor_PP, right_PQ.float()).double()
    for _ in range(_REFINEMENTS + 1):
        left = (weight_P1 * left_of(solution_PQ @ signs_QS, right_PQ @ signs_QS)).norm()
        if left <= _RESIDUAL * wanted:
            return solution_PQ
        if not torch.isfinite(left):
            return None
        solution_PQ += solve_(factor_PP, left_of(solution_PQ, right_PQ).float()).double()
    return None


def float32_factor(
    gram_PP: Tensor, ridge: float, by_input: bool = False
) -> tuple[Tensor | None, Tensor]:
    """What `ridged_factor` returns but for the ridge, which is never raised, in float32; no factor
    where float32 does not find the matrix positive definite.
    """
    check_finite(gram_PP)
    penalty_P = ridge * _squares(gram_PP, by_input)
    factor_PP = gram_PP.float()
    factor_PP.diagonal().add_(penalty_P.float())
    factor_PP, info = torch.linalg.cholesky_ex(factor_PP)
    return (factor_PP if info.item() == 0 else None), penalty_P


def check_finite(*matrices: Tensor) -> None:
    """Raises NotFinite if one of them holds NaN or infinity."""
    # A sum is finite only if all are; finite values whose sum overflows are looked at.
    for matrix in matrices:
        if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
            raise NotFinite("A Gram matrix holds NaN or infinity.")


def restricted(gram: Gram, kept_P: Tensor) -> Gram:
    """The Gram of some of the inputs."""
    return Gram(
        gram.inputs_PP[kept_P][:, kept_P],
        gram.cross_PQ[kept_P],
        gram.input_sum_P[kept_P],
        gram.target_sum_Q,
        gram.energy,
        gram.weight,
    )
