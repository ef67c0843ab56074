"""Hard-concrete gates and the Lagrangian that keeps them on a budget (docs/design.md 3.9).
Tensors only.

Shape suffixes: C coordinates of the stream, L layers, F neurons of the FFN, G KV groups, B windows,
E constraints, N all gates in a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Gates are stretched over this interval and clamped to [0, 1] (Louizos et al. 2018).
_LOW, _HIGH = -0.1, 1.1
_TEMPERATURE = 2 / 3
# What is less than this share of the largest, or than the smallest number here at all, counts as
# nothing, and is not divided by.
_RELATIVE_FLOOR, _FLOOR = 1e-9, 1e-30
# The least gate that is folded into what is kept.
_LEAST_FOLDED_GATE = 0.1


@dataclass(frozen=True)
class Gates:
    """One value for everything that may go: its log-alpha, its gate, or how likely it is open.

    What is not to be cut has none.
    """

    stream_C: Tensor | None = None
    """Coordinates of the residual stream, shared by all layers."""
    neurons_LF: Tensor | None = None
    """Neurons of every layer's FFN."""
    groups_LG: Tensor | None = None
    """KV groups of every layer."""

    def named(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Gates":
        """The same with `function` of every tensor."""
        return Gates(**{name: function(value) for name, value in self.named().items()})


def sampled(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates in [0, 1], many of them exactly 0 or 1, from uniform noise in (0, 1).

    `uniform` may have axes of its own before those of `log_alpha`.
    """
    noise = uniform.log() - (-uniform).log1p()
    return _stretched(((noise + log_alpha) / _TEMPERATURE).sigmoid())


def settled(log_alpha: Tensor) -> Tensor:
    """Gates without noise."""
    return _stretched(log_alpha.sigmoid())


def _stretched(value: Tensor) -> Tensor:
    return (value * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """How likely a sampled gate is not 0."""
    return (log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid()


def interpolated(
    nodes: list[list[float]], values: dict[tuple[float, ...], float], at: list[Tensor]
) -> Tensor:
    """The polynomial through `values` at the points of a grid, whose axes have `nodes`.

    A count of parameters is a polynomial of low degree in the sizes it depends on: with enough
    nodes this is the count itself, at sizes that are expectations.
    """
    weights = []
    for axis, x in zip(nodes, at, strict=True):
        weights.append(
            {
                node: math.prod((x - other) / (node - other) for other in axis if other != node)
                for node in axis
            }
        )
    total = torch.zeros((), dtype=torch.float64)
    for point, value in values.items():
        total = total + value * math.prod(
            weight[node] for weight, node in zip(weights, point, strict=True)
        )
    return total


def multipliers(jacobian_EN: Tensor, gradient_N: Tensor) -> Tensor:
    """Multipliers `l` with which the gradient of the Lagrangian `f + sum_e l_e v_e` is least,
    `(E,)`.

    `gradient_N` is the gradient of `f` by all gates, the rows of `jacobian_EN` those of the
    constraints `v = 0`. Gates count by what they move, not by its square, or the few that cost much
    would set the price for all the others.
    """
    weighted_EN = _weighted(jacobian_EN)
    return torch.linalg.solve(_inner(jacobian_EN, weighted_EN), -(weighted_EN @ gradient_N))


def correction(jacobian_EN: Tensor, violated_E: Tensor) -> Tensor:
    """A change that undoes violations to first order, `(N,)`: the same for all gates of which a
    constraint wants the same, whatever each of them costs, as if a threshold were moved.
    """
    weighted_EN = _weighted(jacobian_EN)
    return -weighted_EN.T @ torch.linalg.solve(_inner(jacobian_EN, weighted_EN), violated_E)


def _weighted(jacobian_EN: Tensor) -> Tensor:
    """Gradients of the constraints, every gate's divided by the largest it has in any of them."""
    largest_N = jacobian_EN.abs().amax(0)
    return jacobian_EN / largest_N.clamp_min(_RELATIVE_FLOOR * largest_N.max() + _FLOOR)


def _inner(jacobian_EN: Tensor, weighted_EN: Tensor) -> Tensor:
    """Products of the constraints' gradients, `(E, E)`, with a small ridge: the matrix is singular
    where one constraint depends on others, or on no gate.
    """
    inner_EE = jacobian_EN @ weighted_EN.T
    inner_EE.diagonal().add_(_RELATIVE_FLOOR * inner_EE.diagonal().max() + _FLOOR)
    return inner_EE


def unevenness(open_LN: Tensor) -> Tensor:
    """By how much each layer's expected share exceeds that of all layers, `(L,)`: a stock config
    holds one number for all of them.
    """
    share_L = open_LN.mean(1)
    return share_L - share_L.mean()


def top_indices(score_N: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest, rising; of equal ones the first."""
    return score_N.argsort(descending=True, stable=True)[:keep].sort().values


def folded(gate: Tensor) -> Tensor:
    """The gate of what is kept, as it is folded into the weights.

    Rounding a shape up keeps some that have all but closed: these get a tenth, or they would be
    kept for nothing.
    """
    return gate.clamp_min(_LEAST_FOLDED_GATE)
