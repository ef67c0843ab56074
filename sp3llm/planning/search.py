"""Which candidate loses least: the walk over their grid."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sp3llm.models.families import Family, is_square
from sp3llm.models.shapes import Shape


def row_of(family: Family, config: Mapping[str, Any], shape: Shape) -> int:
    """The number of the row of candidates that a shape is in; neighbouring rows differ by one step
    of the KV groups, or, where the width is heads times head size, of the embedding width, with
    shapes of whole heads and untied ones in rows of their own.
    """
    if not is_square(family, config):
        return -shape.num_key_value_heads
    dense = Shape.of(family, config)
    if shape.head_dim == dense.head_dim:
        return -1
    if not shape.tie_word_embeddings:
        return 0
    return (dense.word_embed_proj_dim or 0) - (shape.word_embed_proj_dim or 0)


def learnable(family: Family, config: Mapping[str, Any], shapes: list[Shape]) -> list[Shape]:
    """Of the candidates those that a learned mask chooses from.

    It finds the width, the FFN width and the number of KV groups; whether the head is tied, and the
    width of the embedding table, are as in the first candidate.
    """
    first, dense = shapes[0], Shape.of(family, config)
    heads_shrink = any(shape.head_dim != dense.head_dim for shape in shapes)

    def is_learnable(shape: Shape) -> bool:
        same_table = shape.word_embed_proj_dim == first.word_embed_proj_dim
        keeps_table = family.projections is not None and first.tie_word_embeddings
        keeps_groups = shape.num_key_value_heads == dense.num_key_value_heads
        return (
            shape.tie_word_embeddings == first.tie_word_embeddings
            and (same_table or not keeps_table)
            and (keeps_groups or not heads_shrink)
        )

    return [shape for shape in shapes if is_learnable(shape)]


def nearest(shapes: list[Shape], sizes: Mapping[str, float]) -> Shape:
    """The shape nearest to the `sizes` asked for, by field of `Shape`: the least sum of squared
    logarithms of the ratios. A size beyond what any shape has counts as the nearest that one has.
    """
    reached = {name: [getattr(shape, name) for shape in shapes] for name in sizes}
    wanted = {
        name: min(max(size, min(reached[name])), max(reached[name])) for name, size in sizes.items()
    }

    def distance(shape: Shape) -> float:
        return sum(math.log(getattr(shape, name) / size) ** 2 for name, size in wanted.items())

    return min(shapes, key=distance)


def search(
    shapes: list[Shape], loss_of: Callable[[Shape], float], row_of: Callable[[Shape], int]
) -> tuple[Shape, dict[Shape, float]]:
    """Walk from the first candidate to the neighbour that loses least until none loses less.

    Neighbours differ by one step of width (the FFN takes up the remainder) or by one row (of KV
    groups, of the embedding width), so a handful of trials is enough where the loss has one
    valley.

    Returns the best shape and every loss found out.
    """
    numbers = sorted({row_of(shape) for shape in shapes})
    rows = [[shape for shape in shapes if row_of(shape) == number] for number in numbers]
    losses: dict[Shape, float] = {}

    def loss(shape: Shape) -> float:
        if shape not in losses:
            losses[shape] = loss_of(shape)
        return losses[shape]

    best = shapes[0]
    while True:
        row = numbers.index(row_of(best))
        column = rows[row].index(best)
        steps = [(row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column)]
        steps = [(i, j) for i, j in steps if 0 <= i < len(rows) and j >= 0]
        around = [rows[i][j] for i, j in steps if j < len(rows[i])]
        better = min([best, *around], key=loss)
        if better == best:
            return best, losses
        best = better
