"""How sure the refitted model may be: one factor on all its logits, from windows that no fit saw.

Least squares suits the text it is fitted to better than any other, and what comes of it is too
sure of itself on other text (docs/design.md 3.16). The factor goes into the final norm, where every
stock model has a place for it.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sp3llm.compression.ends import mean_divergences, with_head
from sp3llm.compression.refitter import Refitter
from sp3llm.models.families import Family
from sp3llm.models.head import End
from sp3llm.models.objectives.schema import Objective

# Divergences at these lie on a parabola well enough: the least of those measured was at 0.9.
_TRIED = (1.0, 0.95, 0.9)
_LEAST = 0.8


def is_scaled(family: Family, objective: Objective) -> bool:
    """Whether what a model says is logits behind a norm that nothing else reads."""
    return objective.evaluation_windows is not None and not family.post_norm


def scaled_norm(refitter: Refitter, head: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The final norm's tensors of a head's group with its output times a factor."""
    norm, offset = refitter.family.final_norm, refitter.family.norm_offset
    scaled = {f"{norm}.weight": (head[f"{norm}.weight"].double() + offset) * factor - offset}
    if (bias := head.get(f"{norm}.bias")) is not None:
        scaled[f"{norm}.bias"] = bias.double() * factor
    return {name: tensor.to(head[name].dtype) for name, tensor in scaled.items()}


def fit_logit_scale(refitter: Refitter, small: End, dense: End, plain: float) -> float:
    """The factor on the small model's logits, 1 at most, that brings what it says nearest to what
    the dense model does on the windows that both ends are of; 1 where none does better.

    `plain` is the divergence with a factor of 1. The same on every process.
    """

    def at(*factors: float) -> list[float]:
        norms = [scaled_norm(refitter, small.head, factor) for factor in factors]
        scaled = [with_head(refitter, small, norm) for norm in norms]
        return mean_divergences(refitter, scaled, dense)

    factor = least_of_parabola(_TRIED, (plain, *at(*_TRIED[1:])))
    return factor if factor < 1 and at(factor)[0] < plain else 1.0


def least_of_parabola(places: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through three values at evenly spaced places is least, between `_LEAST`
    and the first place; the first place if it has no least value.
    """
    step = places[0] - places[1]
    slope, bend = (values[0] - values[2]) / (2 * step), (values[0] - 2 * values[1] + values[2])
    if not bend > 0:  # NaN too
        return places[0]
    return min(max(places[1] - slope * step**2 / bend, _LEAST), places[0])
