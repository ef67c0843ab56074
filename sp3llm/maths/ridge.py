"""Ridge regressions whose ridge is chosen on held-back tokens (docs/design.md 3.7). Tensors only.

Shape suffixes: P inputs, Q outputs, S columns of a sketch of the outputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp3llm.maths.refit import Gram, add_gram_, check_finite, ridge_solution, squared_error

# Relative to the (mean) diagonal of the Gram matrix. Infinity, plain projection, is always tried.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Tried first where nothing is known: every other one.
_COARSE = RIDGES[1::2]
# Ridges are compared by random combinations of the outputs, where there are more outputs: an
# error's square is that of all in the mean, ridges that are compared share the combinations, and a
# solution costs no more than its factor.
_SKETCH = 128
_SKETCH_SEED = 0


@dataclass(frozen=True)
class Fit:
    """A solution and how it was found."""

    solution_PQ: Tensor
    """`X`, float64."""
    intercept_Q: Tensor | None
    """`b`, float64; None where none was asked for."""
    ridge: float
    """Chosen ridge, relative to the (mean) diagonal; infinity: the plain projection was kept."""
    gain: float
    """How much less than the plain projection the choice misses on the held-back tokens, before
    these are taken in, relative to their energy; of many outputs by random combinations of them."""
    raised: bool
    """The ridge was raised above what held-back tokens chose since the matrix was singular."""


Tried = Mapping[float, tuple[float, float]]
"""By ridge: the ridge that was used in its place, and how much more than the prior the fit misses
of the held-back tokens, relative to their energy."""


def search_ridge(try_all: Callable[[Sequence[float]], Tried], start: float | None = None) -> Tried:
    """Try ridges until the held-back error turns, which it does once.

    `try_all` tries several, which processes may share out. `start` is where the best one is
    expected: it and its neighbours are tried first; infinity expects none. Without it every other
    one is, then the neighbours of the best.
    """
    tried: dict[float, tuple[float, float]] = {}
    wanted = list(_COARSE) if start is None else _around(RIDGES.index(_nearest(start)))
    while wanted:
        tried |= try_all(wanted)
        best = min(tried, key=lambda ridge: tried[ridge][1])
        if start is not None and tried[best][1] >= 0 and RIDGES[-1] in tried:
            break  # nothing beats plain projection, nor do weaker ridges than one that does not
        wanted = [ridge for ridge in _around(RIDGES.index(best)) if ridge not in tried]
    return tried


def _nearest(ridge: float) -> float:
    """The one of `RIDGES` nearest to a ridge."""
    return min(RIDGES, key=lambda one: abs(math.log(one) - math.log(min(ridge, RIDGES[-1]))))


def _around(index: int) -> list[float]:
    """A ridge and its neighbours."""
    return list(RIDGES[max(0, index - 1) : index + 2])


def ridge_errors(
    fitting: Gram,
    held_back: Gram,
    prior_PQ: Tensor,
    prior_intercept_Q: Tensor | None,
    ridges: Sequence[float],
    dtype: torch.dtype = torch.float64,
    by_input: bool = False,
) -> dict[float, tuple[float, float]]:
    """What `search_ridge` asks of some ridges; `dtype` and `by_input` are those of
    `ridge_solution`.

    Raises NotFinite if a Gram holds NaN or infinity.
    """
    for gram in (fitting, held_back):
        check_finite(gram.inputs_PP, gram.cross_PQ)
    sketch_QS = sketch_of(prior_PQ)
    if sketch_QS is not None:
        fitting, held_back = (_of_outputs(gram, sketch_QS) for gram in (fitting, held_back))
        prior_PQ = prior_PQ @ sketch_QS
        prior_intercept_Q = None if prior_intercept_Q is None else prior_intercept_Q @ sketch_QS
    intercept = prior_intercept_Q is not None
    plain = squared_error(held_back, prior_PQ, prior_intercept_Q) if ridges else 0.0
    tried = {}
    for ridge in ridges:
        solution_PQ, intercept_Q, used = ridge_solution(
            fitting, prior_PQ, ridge, intercept, dtype, by_input
        )
        tried[ridge] = (used, squared_error(held_back, solution_PQ, intercept_Q) - plain)
    return tried


def sketch_of(matrix_PQ: Tensor) -> Tensor | None:
    """Random signs that combine a matrix's columns such that squares of rows stay what they are in
    the mean, `(Q, S)`, in its dtype; None: there are few columns anyway.
    """
    outputs = matrix_PQ.shape[1]
    if outputs <= _SKETCH:
        return None
    generator = torch.Generator().manual_seed(_SKETCH_SEED)
    signs_QS = torch.randint(2, (outputs, _SKETCH), generator=generator) * 2.0 - 1
    return (signs_QS / math.sqrt(_SKETCH)).to(matrix_PQ)


def _of_outputs(gram: Gram, sketch_QS: Tensor) -> Gram:
    """The Gram of combinations of the outputs; its energy stays that of all outputs."""
    return replace(
        gram, cross_PQ=gram.cross_PQ @ sketch_QS, target_sum_Q=gram.target_sum_Q @ sketch_QS
    )


def ridge_fit(
    fitting: Gram,
    held_back: Gram,
    prior_PQ: Tensor,
    prior_intercept_Q: Tensor | None = None,
    tried: Tried | None = None,
    dtype: torch.dtype = torch.float64,
    by_input: bool = False,
) -> Fit:
    """Fit towards a prior, the ridge chosen on held-back tokens, then on all tokens together.

    A fixed ridge is not safe: with few tokens a small one doubles the error of the plain
    projection, with many a large one loses the gain. The grid ends in infinity, the prior itself,
    so no fit is chosen that does worse on held-back tokens than plain projection. An intercept is
    fitted where `prior_intercept_Q` is given. `tried` is what `search_ridge` found, where several
    processes shared that out; `dtype` and `by_input` are those of `ridge_solution`.

    `fitting` takes in `held_back`, in place, once the ridge is chosen.
    """
    if tried is None:
        priors = (prior_PQ, prior_intercept_Q)
        tried = search_ridge(
            lambda some: ridge_errors(fitting, held_back, *priors, some, dtype, by_input)
        )
    best, most = float("inf"), 0.0
    for used, more in tried.values():
        if -more > most:
            best, most = used, -more
    if best == float("inf"):
        return Fit(prior_PQ, prior_intercept_Q, best, 0.0, False)
    both = add_gram_(fitting, held_back)
    intercept = prior_intercept_Q is not None
    solution_PQ, intercept_Q, used = ridge_solution(
        both, prior_PQ, best, intercept, dtype, by_input
    )
    return Fit(solution_PQ, intercept_Q, used, most, used > best)
