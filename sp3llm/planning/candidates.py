"""From a budget to the shapes worth trying, before any weight is touched."""

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family
from sp3llm.models.served import check_export
from sp3llm.models.shapes import Shape, keeps_every_layer
from sp3llm.planning.by_hand import start_shape
from sp3llm.planning.limits import Limits, check_count, width_step
from sp3llm.planning.spending import (
    Request,
    nothing_fits,
    request_of,
    with_widest_ffn,
    with_widest_stream,
)
from sp3llm.planning.square import square_candidates

# How many eighths of the KV groups are tried, beside all of them. Of 8 groups, a usual number, they
# go one by one; where there are more, every step is a trial, and finer ones would cost more trials.
_GROUP_EIGHTHS = (7, 6, 5, 4, 3)
# Hidden sizes rise in steps of the dense one over this, at least: every step is a trial as well.
_MOST_WIDTHS = 16
# Layers fall in steps of the dense model's number over this, down to this part of it.
_MOST_DEPTHS, _LEAST_DEPTH = 16, 0.75


def candidates(family: Family, config: Mapping[str, Any], limits: Limits) -> list[Shape]:
    """Shapes worth trying at the budget, the one that spends all of it on the width first.

    Layers fall in steps of a sixteenth, KV groups of about an eighth; for each number of them
    hidden sizes rise from the widest that leaves the FFN whole, in steps of a sixteenth at least,
    and the FFN takes up the remainder of the budget, down to three tenths. Sizes fixed by hand
    stay, and so do experts. Where fewer rows of the vocabulary are all that the budget asks for,
    nothing else is cut.

    Raises UserError if none fits, a size fixed by hand is impossible, or the model cannot be
    written as the class asked for.
    """
    check_export(family, config, limits.export_as)
    check_count(family, limits)
    request = request_of(family, config, limits)
    whole = replace(request.dense, vocab_size=limits.vocab_rows or request.dense.vocab_size)
    if whole != request.dense and not limits.by_hand and request.cost(whole) <= request.budget:
        return [whole]
    return _candidates(request)


def without_trials(shapes: list[Shape]) -> Shape:
    """Of candidates the one to take where none is tried: the first, unless another has whatever
    that has, and more.
    """
    sizes = {shape: _sizes(shape) for shape in shapes}
    return next(
        shape
        for shape in shapes
        if not any(other != shape and _holds(shape, more) for other, more in sizes.items())
    )


def _candidates(request: Request) -> list[Shape]:
    """Candidates of every number of layers, the most first, and for each of either tie."""
    shapes: list[Shape] = []
    refusals = []
    for depth in _depths(request):
        of_depth: list[Shape] = []
        for tie in _ties(request):
            limits = replace(request.limits, tie=tie, num_hidden_layers=depth)
            try:
                of_depth += _of_one_kind(replace(request, limits=limits))
            except UserError as refusal:  # any may be impossible, or over the budget
                refusals.append(refusal)
        sizes = [_sizes(more) for more in shapes]
        shapes += [shape for shape in of_depth if not any(map(partial(_holds, shape), sizes))]
    if not shapes:
        raise refusals[-len(_ties(request))]
    return shapes


def _depths(request: Request) -> list[int | None]:
    """Numbers of layers that are tried, the most first; None: all."""
    limits, most = request.limits, request.dense.num_hidden_layers
    searched = not (limits.only_width or limits.every_layer) and limits.num_hidden_layers is None
    if not searched or keeps_every_layer(request.family, request.config) is not None:
        return [limits.num_hidden_layers]
    step = max(1, round(most / _MOST_DEPTHS))
    return [None, *range(most - step, math.ceil(_LEAST_DEPTH * most) - 1, -step)]


def _ties(request: Request) -> list[str]:
    """What becomes of a tied head, in the order in which it is tried."""
    if request.limits.tie != "auto":
        return [request.limits.tie]
    return ["keep", "untie"] if request.dense.tie_word_embeddings else ["keep"]


def _holds(shape: Shape, more: tuple[int, ...]) -> bool:
    """Whether another shape, of sizes `more`, has whatever a shape has, which then loses more."""
    tied, *sizes = _sizes(shape)
    return tied == more[0] and all(map(operator.ge, more[1:], sizes))


def _sizes(shape: Shape) -> tuple[int, ...]:
    """Whether the head is tied, and everything that a shape has a number of."""
    return (
        *(shape.tie_word_embeddings, shape.hidden_size, shape.intermediate_size, shape.head_dim),
        *(shape.num_key_value_heads, shape.num_hidden_layers, shape.word_embed_proj_dim or 0),
    )


def _of_one_kind(request: Request) -> list[Shape]:
    """Candidates of one number of layers and one tie."""
    start = start_shape(request)
    if request.is_square:
        return square_candidates(request, start)
    group_counts = _group_counts(request)
    shapes = [
        shape
        for count in group_counts
        for shape in _of_groups(request, request.with_groups(start, count))
        if shape != request.dense and shape.hidden_size % shape.num_attention_heads == 0
    ]
    if not shapes:
        least = request.limits.hidden_size or width_step(request.limits, request.dense)
        raise nothing_fits(request, request.with_groups(start, group_counts[-1]).with_width(least))
    return shapes if request.family.experts is None else list(_ever_wider(shapes))


def _group_counts(request: Request) -> list[int]:
    """Numbers of KV groups that are tried, the most first."""
    limits, most = request.limits, request.dense.num_key_value_heads
    if limits.num_key_value_heads is not None:
        return [limits.num_key_value_heads]
    counts = [most]
    if request.merges_heads and not limits.only_width:
        # As many to each, so that the heads that are left divide those that there were.
        divisors = [count for count in range(most - 1, 0, -1) if most % count == 0]
        return [most, *(count for count in divisors if count % limits.tensor_parallel == 0)]
    for eighths in () if limits.only_width else _GROUP_EIGHTHS:
        count = most * eighths // 8
        count -= count % limits.tensor_parallel
        if 0 < count < counts[-1]:
            counts.append(count)
    return counts


def _of_groups(request: Request, start: Shape) -> list[Shape]:
    """Candidates of one number of KV groups, that of `start`: the widest with the whole FFN, and
    wider ones with less FFN.
    """
    limits, dense = request.limits, request.dense
    whole = with_widest_stream(request, start)
    first = [] if whole is None else [whole]
    if request.keeps_ffn or (limits.hidden_size is not None and first):
        return first
    if limits.hidden_size is not None:
        widths = [limits.hidden_size]
    else:
        multiple = math.lcm(width_step(limits, dense), start.num_attention_heads)
        step = max(1, dense.hidden_size // _MOST_WIDTHS // multiple) * multiple
        narrowest = multiple if whole is None else whole.hidden_size + step
        widths = range(narrowest, dense.hidden_size + 1, step)
    cut = [with_widest_ffn(request, start.with_width(width)) for width in widths]
    return first + [shape for shape in cut if shape is not None]


def _ever_wider(shapes: list[Shape]) -> Iterator[Shape]:
    """Of the shapes those that are wider than all before them.

    Attention is little of a model with experts, and widths are coarse: fewer KV groups that buy no
    width can only lose more.
    """
    widest = 0
    for shape in shapes:
        if shape.hidden_size > widest:
            widest = shape.hidden_size
            yield shape
