"""Candidates with fewer tokens than the largest vocabulary, in place of what else would be cut."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family
from sp3llm.models.shapes import Shape
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits
from sp3llm.planning.spending import Request, request_of, with_widest_ffn


def with_fewer_rows(
    family: Family,
    config: Mapping[str, Any],
    limits: Limits,
    shapes: Sequence[Shape],
    fewer: Sequence[int],
) -> list[Shape]:
    """The candidates `shapes` with every number of rows in `fewer`, which falls, in the tables of
    the vocabulary: what that frees of the budget is spent on the FFN, so that bases of the stream
    are shared, or, where the FFN stays as it is, on whatever `candidates` spends it on. Where
    nothing but rows has to go, nothing else does, and no fewer are tried.

    Raises UserError as `candidates` does.
    """
    found: list[Shape] = []
    largest = max(shape.vocab_size for shape in shapes)
    if any(_is_whole(shape, family, config) for shape in shapes):
        return found
    for rows in fewer:
        request = request_of(family, config, replace(limits, vocab_rows=rows))
        try:
            of_rows = candidates(family, config, request.limits)
        except UserError:  # sizes fixed by hand may leave nothing to cut
            continue
        if _is_whole(of_rows[0], family, config):
            return [*found, *of_rows]
        if not request.keeps_ffn:
            spent = (_with_widest_ffn(request, replace(one, vocab_size=rows)) for one in shapes)
            of_rows = [
                shape
                for shape in spent
                if shape is not None and replace(shape, vocab_size=largest) not in shapes
            ]
        found += of_rows
    return found


def rows_alone(family: Family, config: Mapping[str, Any], limits: Limits) -> int:
    """Rows of the tables of the vocabulary that the budget has room for where nothing else is cut;
    0: sizes are fixed by hand, or rows are not counted.
    """
    request = request_of(family, config, limits)
    whole, rows = request.dense, request.dense.vocab_size
    a_row = request.cost(whole) - request.cost(replace(whole, vocab_size=rows - 1))
    if limits.by_hand or not a_row:
        return 0
    return max(0, rows - math.ceil((request.cost(whole) - request.budget) / a_row))


def _with_widest_ffn(request: Request, start: Shape) -> Shape | None:
    """`start` with the widest FFN within the budget; None where that is too narrow."""
    whole = replace(start, intermediate_size=request.dense.intermediate_size)
    return whole if request.cost(whole) <= request.budget else with_widest_ffn(request, start)


def _is_whole(shape: Shape, family: Family, config: Mapping[str, Any]) -> bool:
    dense = Shape.of(family, config)
    return replace(shape, vocab_size=dense.vocab_size) == dense
