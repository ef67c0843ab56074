"""Closed-form refit: ridge regressions from Gram matrices (docs/design.md 3.7). Tensors only.

Cutting is not the end. Every matrix is fitted again to what the small model really sees: readers
of a site share one map from the small stream to the dense one, writers chase the dense stream
with the errors made so far. Only Gram matrices are kept, so memory does not grow with the text.

Shape suffixes: N tokens, P inputs, Q outputs, D and K residual width before and after, F the
width that a writer reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp3llm.maths.moments import TOKENS_A_BLOCK
from sp3llm.maths.products import product, symmetric_product

# Relative to the mean diagonal of the Gram matrix. Infinity, plain projection, is always tried.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# What a ridge of zero is raised to first: above float64's epsilon, below which nothing changes.
_LEAST_RAISED_RIDGE = 1e-15


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


@dataclass(frozen=True)
class Fit:
    """A solution and how it was found."""

    solution_PQ: Tensor
    """`X`, float64."""
    intercept_Q: Tensor | None
    """`b`, float64; None where none was asked for."""
    ridge: float
    """Chosen ridge, relative to the mean diagonal; infinity: the plain projection was kept."""
    error: float
    """Relative squared error of the choice on the held-back tokens."""
    plain_error: float
    """The plain projection's."""
    raised: bool
    """The ridge was raised above what held-back tokens chose since the matrix was singular."""


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


def add_to_gram(gram: Gram, a_NP: Tensor, y_NQ: Tensor, weight_N: Tensor | None = None) -> None:
    """Add tokens, in place. `a` is `(..., P)`, `y` `(..., Q)`, `weight` `(...)`, all floating.

    Products are float32 over blocks (float64 for float64 input), sums float64.
    """
    a_NP, y_NQ = a_NP.reshape(-1, a_NP.shape[-1]), y_NQ.reshape(-1, y_NQ.shape[-1])
    weights = None if weight_N is None else weight_N.reshape(-1).split(TOKENS_A_BLOCK)
    blocks = zip(a_NP.split(TOKENS_A_BLOCK), y_NQ.split(TOKENS_A_BLOCK), strict=True)
    for index, (block_NP, block_NQ) in enumerate(blocks):
        weighted_NP, squares_N = block_NP, block_NQ.square().sum(1)
        weight_N = torch.ones_like(squares_N)
        if weights is not None:
            weight_N = weights[index]
            weighted_NP = block_NP * weight_N[:, None]
        gram.inputs_PP.add_(symmetric_product(weighted_NP, block_NP))
        gram.cross_PQ.add_(product(weighted_NP, block_NQ))
        gram.input_sum_P.add_(weight_N @ block_NP.to(weight_N))
        gram.target_sum_Q.add_(weight_N @ block_NQ)
        gram.energy.add_((weight_N * squares_N).sum(dtype=torch.float64))
        gram.weight.add_(weight_N.sum(dtype=torch.float64))


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


def ridged_factor(gram_PP: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Cholesky factor of `G + lambda I`, the mean diagonal of `G`, and the relative ridge used.

    `lambda` is `ridge` times the mean diagonal. Where the matrix is not positive definite to
    working precision the ridge is raised tenfold until it is. A matrix of zeros, inputs that never
    fire, counts as one of mean diagonal 1. `gram_PP` stays as it is; the factor takes the only
    other matrix of its size.

    Raises NotFinite if `gram_PP` holds NaN or infinity, which no ridge makes positive definite.
    """
    _check_finite(gram_PP)
    diagonal_P = gram_PP.diagonal()
    scale = diagonal_P.mean()
    if not torch.isfinite(scale):  # of finite numbers the sum can overflow, the mean cannot
        scale = (diagonal_P / len(diagonal_P)).sum()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # In columns, as LAPACK has it: in rows it would be copied there and back.
    factor_PP = torch.empty_like(gram_PP).mT
    info = torch.empty((), dtype=torch.int32, device=gram_PP.device)
    while math.isfinite(ridge * scale.item()):
        factor_PP.copy_(gram_PP)
        factor_PP.diagonal().add_(ridge * scale)
        torch.linalg.cholesky_ex(factor_PP, out=(factor_PP, info))
        if info.item() == 0:
            return factor_PP, scale, ridge
        ridge = max(10 * ridge, _LEAST_RAISED_RIDGE)
    raise NotFinite("No finite ridge makes the Gram matrix positive definite.")


def solve_(factor_PP: Tensor, right_PQ: Tensor) -> Tensor:
    """`(L L^T)^-1 right`; `right` may be overwritten. `cholesky_solve` would copy the factor, which
    at the largest shapes is gigabytes.
    """
    in_columns_PQ = right_PQ.mT.contiguous().mT
    torch.linalg.solve_triangular(factor_PP, in_columns_PQ, upper=False, out=in_columns_PQ)
    torch.linalg.solve_triangular(factor_PP.mT, in_columns_PQ, upper=True, out=in_columns_PQ)
    return in_columns_PQ


def solve_towards(factor_PP: Tensor, penalty: float, cross_PQ: Tensor, prior_PQ: Tensor) -> Tensor:
    """`(G + lambda I)^-1 (C + lambda X_0)`, `(P, Q)`: the ridge regression that shrinks towards
    `prior_PQ`, from the Cholesky factor of `G + lambda I`; `penalty` is `lambda`.
    """
    return solve_(factor_PP, torch.add(cross_PQ, prior_PQ, alpha=penalty))


def ridge_solution(
    gram: Gram, prior_PQ: Tensor, ridge: float, intercept: bool
) -> tuple[Tensor, Tensor | None, float]:
    """`argmin_X sum w |y - a X - b|^2 + lambda |X - prior|^2`, `b` unpenalised, by Cholesky.

    `lambda` is `ridge` times the mean diagonal of `sum w a a^T` (centred if there is an
    intercept). Where the matrix is not positive definite to working precision the ridge is raised
    tenfold until it is.

    Returns `X`, `b` (None without intercept) and the ridge used. Raises NotFinite if the Gram's
    matrix of the inputs holds NaN or infinity.
    """
    inputs_PP, cross_PQ = gram.inputs_PP, gram.cross_PQ
    if intercept:
        mean_P, mean_Q = gram.input_sum_P / gram.weight, gram.target_sum_Q / gram.weight
        inputs_PP = torch.addr(inputs_PP, gram.input_sum_P, mean_P, alpha=-1)
        cross_PQ = torch.addr(cross_PQ, gram.input_sum_P, mean_Q, alpha=-1)
    factor_PP, scale, ridge = ridged_factor(inputs_PP, ridge)
    solution_PQ = solve_towards(factor_PP, ridge * scale.item(), cross_PQ, prior_PQ)
    return solution_PQ, mean_Q - mean_P @ solution_PQ if intercept else None, ridge


def _check_finite(*matrices: Tensor) -> None:
    """Raises NotFinite if one of them holds NaN or infinity."""
    # A sum is finite only if all are; finite values whose sum overflows are looked at.
    for matrix in matrices:
        if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
            raise NotFinite("A Gram matrix holds NaN or infinity.")


def ridge_errors(
    fitting: Gram,
    held_back: Gram,
    prior_PQ: Tensor,
    intercept: bool,
    ridges: Sequence[float] = RIDGES,
) -> list[tuple[float, float]]:
    """For every ridge: the ridge used, and the fit's relative squared error on held-back tokens.

    Raises NotFinite if a Gram holds NaN or infinity.
    """
    for gram in (fitting, held_back):
        _check_finite(gram.inputs_PP, gram.cross_PQ)
    errors = []
    for ridge in ridges:
        solution_PQ, intercept_Q, used = ridge_solution(fitting, prior_PQ, ridge, intercept)
        errors.append((used, squared_error(held_back, solution_PQ, intercept_Q)))
    return errors


def ridge_fit(
    fitting: Gram,
    held_back: Gram,
    prior_PQ: Tensor,
    prior_intercept_Q: Tensor | None = None,
    errors: Sequence[tuple[float, float]] | None = None,
) -> Fit:
    """Fit towards a prior, the ridge chosen on held-back tokens, then on all tokens together.

    A fixed ridge is not safe: with few tokens a small one doubles the error of the plain
    projection, with many a large one loses the gain. The grid ends in infinity, the prior itself,
    so the fit never does worse on the held-back tokens than plain projection. An intercept is
    fitted where `prior_intercept_Q` is given. `errors` are those of `ridge_errors`, where several
    processes shared them out.

    `fitting` takes in `held_back`, in place, once the ridge is chosen.
    """
    intercept = prior_intercept_Q is not None
    if errors is None:
        errors = ridge_errors(fitting, held_back, prior_PQ, intercept)
    plain_error = squared_error(held_back, prior_PQ, prior_intercept_Q)
    best, best_error = float("inf"), plain_error
    for used, error in errors:
        if error < best_error:
            best, best_error = used, error
    if best == float("inf"):
        return Fit(prior_PQ, prior_intercept_Q, best, best_error, plain_error, False)
    both = add_gram_(fitting, held_back)
    solution_PQ, intercept_Q, used = ridge_solution(both, prior_PQ, best, intercept)
    return Fit(solution_PQ, intercept_Q, used, best_error, plain_error, used > best)


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
