"""Spend a budget on one size: the widest stream or FFN that it has room for."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family
from sp3llm.models.shapes import Shape
from sp3llm.planning.limits import (
    Limits,
    cost_in,
    intermediate_multiple,
    stays_square,
    width_step,
)

# An FFN is cut to this fraction of the dense one at least. The search settles far above: at half of
# the bundled model's parameters it keeps 0.62 of it.
_LEAST_FFN = 0.3


@dataclass(frozen=True)
class Request:
    """A model, and what a plan may do to it. `request_of` makes it."""

    family: Family
    config: Mapping[str, Any]
    """The dense `config.json`."""
    limits: Limits
    dense: Shape
    """The shape that `config` describes."""
    budget: float
    """The most that a shape may count, of what `limits.of` names."""

    def cost(self, shape: Shape) -> int:
        """What a shape counts, of what the budget is about."""
        return cost_in(self.family, self.config, self.limits, shape)

    @property
    def is_square(self) -> bool:
        """Whether `hidden_size` must stay heads times head size."""
        return stays_square(self.family, self.config, self.limits)

    @property
    def merges_heads(self) -> bool:
        """Whether key-value heads that go are merged into others, and all query heads stay."""
        return self.limits.kv_heads == "merge"

    def with_groups(self, shape: Shape, count: int) -> Shape:
        """A shape with another number of key-value heads."""
        if self.merges_heads:
            return shape.with_merged_groups(count)
        return shape.with_groups(count)

    @property
    def keeps_tie(self) -> bool:
        """Whether the head goes on sharing the embedding table."""
        return self.dense.tie_word_embeddings and self.limits.tie != "untie"

    @property
    def keeps_ffn(self) -> bool:
        """Whether the FFN does not make way for the width: by hand, or as experts' never do."""
        return (
            self.limits.only_width
            or self.limits.intermediate_size is not None
            or self.family.experts is not None
        )


def request_of(family: Family, config: Mapping[str, Any], limits: Limits) -> Request:
    """What is asked of a model, with the dense shape and the budget counted."""
    dense = Shape.of(family, config)
    budget = limits.keep * cost_in(family, config, limits, dense)
    return Request(family, config, limits, dense, budget)


def with_widest_stream(request: Request, start: Shape) -> Shape | None:
    """`start` at the largest hidden size within the budget; None where even the smallest is not.

    The width is a multiple that the heads of both the dense and the new shape divide, or the one
    fixed by hand.
    """
    if request.limits.hidden_size is not None:
        widths = [request.limits.hidden_size]
    else:
        multiple = math.lcm(width_step(request.limits, request.dense), start.num_attention_heads)
        widths = list(range(multiple, request.dense.hidden_size + 1, multiple))

    def cost(width: int) -> int:
        return request.cost(start.with_width(width))

    fitting = bisect.bisect_right(widths, request.budget, key=cost)
    return start.with_width(widths[fitting - 1]) if fitting else None


def with_widest_ffn(request: Request, start: Shape) -> Shape | None:
    """`start` with the widest FFN within the budget that is narrower than the dense one; None
    where that is below `_LEAST_FFN` of it.
    """
    dense = request.dense
    multiple = intermediate_multiple(dense.hidden_size, request.limits.tensor_parallel)
    widths = range(multiple, dense.intermediate_size, multiple)

    def cost(width: int) -> int:
        return request.cost(replace(start, intermediate_size=width))

    fitting = bisect.bisect_right(widths, request.budget, key=cost)
    if not fitting or widths[fitting - 1] < _LEAST_FFN * dense.intermediate_size:
        return None
    return replace(start, intermediate_size=widths[fitting - 1])


def nothing_fits(request: Request, smallest: Shape) -> UserError:
    """The refusal of a budget that not even the smallest shape keeps within."""
    limits = request.limits
    least = request.cost(smallest) / request.cost(request.dense)
    least = math.ceil(least * 1e4) / 1e4  # so that the number named is one that works
    return UserError(
        f"No {'square ' if limits.square else ''}shape keeps {limits.keep:.4g} of the model's "
        f"{limits.of}: the smallest that the "
        f"limits allow (hidden_size {smallest.hidden_size}, intermediate_size "
        f"{smallest.intermediate_size}, num_key_value_heads {smallest.num_key_value_heads}, "
        f"num_hidden_layers {smallest.num_hidden_layers}) keeps {least:.4f}; raise --keep."
    )
