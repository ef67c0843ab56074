"""From a budget to the shapes worth trying, before any weight is touched."""

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import (
    Family,
)
from sp3llm.models.shapes import Shape
from sp3llm.planning.limits import (
    Limits,
    cost_in,
    intermediate_multiple,
    stays_square,
    width_step,
)


def widest(family: Family, config: Mapping[str, Any], limits: Limits, start: Shape) -> Shape | None:
    """`start` at the largest hidden size within the budget; None where even the smallest is not.

    The width is a multiple that the heads of both the dense and the new shape divide.
    """
    dense = Shape.of(family, config)
    budget = limits.keep * cost_in(family, config, limits, dense)
    if limits.hidden_size is not None:
        widths = [limits.hidden_size]
    else:
        multiple = math.lcm(width_step(limits, dense), start.num_attention_heads)
        widths = list(range(multiple, dense.hidden_size + 1, multiple))

    def cost(width: int) -> int:
        return cost_in(family, config, limits, start.with_width(width))

    fitting = bisect.bisect_right(widths, budget, key=cost)
    return start.with_width(widths[fitting - 1]) if fitting else None


def start_shape(family: Family, config: Mapping[str, Any], limits: Limits) -> Shape:
    """The dense shape with everything fixed by hand.

    Raises UserError if a size fixed by hand is not one that the model can be cut to.
    """
    dense = Shape.of(family, config)
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads"):
        asked, most = getattr(limits, name), getattr(dense, name)
        if asked is not None and not 0 < asked <= most:
            raise UserError(
                f"Expected --{name.replace('_', '-')} between 1 and the model's {most}, found "
                f"{asked}: give a smaller number."
            )
    if limits.intermediate_size is not None and family.experts is not None:
        raise UserError(
            f"Expected no --intermediate-size for a {family.model_type} model, whose experts keep "
            f"their widths, found {limits.intermediate_size}: leave it out."
        )
    if limits.word_embed_proj_dim is not None:
        if family.projections is None or limits.tie == "untie" or not dense.tie_word_embeddings:
            raise UserError(
                "Expected a tied model of a family whose embeddings have a width of their own for "
                "--word-embed-proj-dim (opt), found another: leave it out."
            )
        if not 0 < limits.word_embed_proj_dim <= dense.word_embed_proj_dim:
            raise UserError(
                "Expected --word-embed-proj-dim between 1 and the model's "
                f"{dense.word_embed_proj_dim}, found {limits.word_embed_proj_dim}: give a smaller "
                "number."
            )
    if (
        dense.tie_word_embeddings
        and not limits.tie == "untie"
        and family.centred
        and not family.projections
    ):
        raise UserError(
            f"A tied head cannot be kept in a {family.model_type} model, whose LayerNorm leaves no "
            "diagonal to tie through: use --tie untie."
        )
    square = stays_square(family, config, limits)
    if limits.tie == "untie" and not dense.tie_word_embeddings:
        raise UserError(
            "Expected a model with tied embeddings for --tie untie, found one whose head has a "
            "table of its own: leave it out."
        )
    if limits.head_dim is not None:
        if limits.num_key_value_heads is not None:
            raise UserError(
                "Expected one of --head-dim, which keeps every head, and --num-key-value-heads, "
                "which keeps heads whole, found both: leave one out."
            )
        if not square or family.rotary:
            raise UserError(
                "Expected a model whose heads can shrink for --head-dim (opt), found rotary "
                "embedding, which forbids it: leave it out."
            )
        if not 0 < limits.head_dim < dense.head_dim:
            raise UserError(
                f"Expected --head-dim between 1 and {dense.head_dim - 1}, below the model's "
                f"{dense.head_dim}, found {limits.head_dim}: give a smaller number."
            )
    multiple = width_step(limits, dense)
    if not square and multiple % dense.num_attention_heads:
        raise UserError(
            f"Expected --multiple-of to be a multiple of the {dense.num_attention_heads} attention "
            f"heads, which must divide the hidden size, found {multiple}: use "
            f"{math.lcm(multiple, dense.num_attention_heads)}."
        )
    shape = dense.with_groups(limits.num_key_value_heads or dense.num_key_value_heads)
    shape = replace(shape, intermediate_size=limits.intermediate_size or dense.intermediate_size)
    shape = shape.untied() if limits.tie == "untie" else shape
    heads = math.lcm(dense.num_attention_heads, shape.num_attention_heads)
    if not square and limits.hidden_size is not None and limits.hidden_size % heads:
        raise UserError(
            f"Expected --hidden-size to be a multiple of the {dense.num_attention_heads} attention "
            f"heads (and of the {shape.num_attention_heads} that are kept), which Hugging Face "
            f"demands, found {limits.hidden_size}: use a multiple of {heads}."
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(shape, name) % limits.tensor_parallel:
            raise UserError(
                f"Expected {name} to be a multiple of --tensor-parallel {limits.tensor_parallel}, "
                f"found {getattr(shape, name)}: choose other sizes or fewer devices."
            )
    return shape


def candidates(family: Family, config: Mapping[str, Any], limits: Limits) -> list[Shape]:
    """Shapes worth trying at the budget, the one that spends all of it on the width first.

    KV groups fall in steps of about an eighth; for each number of them hidden sizes rise from the
    widest that leaves the FFN whole, in steps of a sixteenth at least, and the FFN takes up the
    remainder of the budget, down to three tenths. Sizes fixed by hand stay, and so do experts.

    Raises UserError if none fits.
    """
    dense = Shape.of(family, config)
    if limits.tie == "auto":
        if not dense.tie_word_embeddings:
            return candidates(family, config, replace(limits, tie="keep"))
        found, refusals = [], []
        for tie in ("keep", "untie"):
            try:
                found += candidates(family, config, replace(limits, tie=tie))
            except UserError as refusal:  # one of the two may be impossible, or over the budget
                refusals.append(refusal)
        if not found:
            raise refusals[0]
        return found
    start = start_shape(family, config, limits)
    if stays_square(family, config, limits):
        return _square_candidates(family, config, limits)
    group_counts = [start.num_key_value_heads]
    if limits.num_key_value_heads is None and not limits.only_width:
        for eighth in range(7, 2, -1):
            count = dense.num_key_value_heads * eighth // 8
            count -= count % limits.tensor_parallel
            if 0 < count < group_counts[-1]:
                group_counts.append(count)
    found = [
        shape
        for groups in group_counts
        for shape in _with_groups(family, config, limits, start.with_groups(groups))
        if shape != dense and shape.hidden_size % shape.num_attention_heads == 0
    ]
    if family.experts is not None:
        # Attention is little of such a model, and widths are coarse: fewer groups that buy no
        # width can only lose more.
        widest_yet = [0, *itertools.accumulate((shape.hidden_size for shape in found), max)]
        found = [s for s, width in zip(found, widest_yet, strict=False) if s.hidden_size > width]
    if not found:
        smallest = start.with_groups(group_counts[-1])
        smallest = smallest.with_width(limits.hidden_size or width_step(limits, dense))
        raise _nothing_fits(family, config, limits, smallest)
    return found


def _nothing_fits(
    family: Family, config: Mapping[str, Any], limits: Limits, smallest: Shape
) -> UserError:
    dense = Shape.of(family, config)
    least = cost_in(family, config, limits, smallest) / cost_in(family, config, limits, dense)
    least = math.ceil(least * 1e4) / 1e4  # so that the number named is one that works
    return UserError(
        f"No {'square ' if limits.square else ''}shape keeps {limits.keep:.4g} of the model's "
        f"{limits.of}: the smallest that the "
        f"limits allow (hidden_size {smallest.hidden_size}, intermediate_size "
        f"{smallest.intermediate_size}, num_key_value_heads {smallest.num_key_value_heads}) "
        f"keeps {least:.4f}; raise --keep."
    )


def _square_candidates(family: Family, config: Mapping[str, Any], limits: Limits) -> list[Shape]:
    """Shapes whose width is heads times head size, the full embedding width first.

    Heads shrink alike where no rotary embedding forbids it, in steps of 8, or go whole; where
    embeddings have a width of their own, three quarters and half of it are tried too. In each row
    hidden sizes rise from the widest that leaves the FFN whole, which takes up the remainder.
    """
    dense, start = Shape.of(family, config), start_shape(family, config, limits)
    rows: list[list[Shape]] = []
    if not family.rotary and limits.num_key_value_heads is None:
        head_dims = [limits.head_dim] if limits.head_dim else range(8, dense.head_dim, 8)
        for width in _embedding_widths(family, config, limits):
            rows.append(
                [
                    replace(start, head_dim=head_dim, word_embed_proj_dim=width)
                    for head_dim in head_dims
                ]
            )
    width = _embedding_widths(family, config, limits)[0]
    counts = range(limits.tensor_parallel, dense.num_key_value_heads + 1, limits.tensor_parallel)
    if limits.num_key_value_heads is not None:
        counts = [limits.num_key_value_heads]
    elif limits.head_dim is not None:
        counts = []
    whole = [replace(dense, word_embed_proj_dim=width).with_groups(count) for count in counts]
    rows.append(
        [
            replace(shape, intermediate_size=start.intermediate_size,
                    tie_word_embeddings=start.tie_word_embeddings)
            for shape in whole
        ]
    )  # fmt: skip
    found: list[Shape] = []
    shapes = [_squared(limits, dense, shape) for row in rows for shape in row]
    for row in rows:
        square = [_squared(limits, dense, shape) for shape in row]
        found += _filled_row(family, config, limits, [s for s in square if s is not None])
    if not found:
        legal = [shape for shape in shapes if shape is not None]
        if not legal:
            raise _nothing_square(family, dense, limits)
        raise _nothing_fits(family, config, limits, min(
            legal, key=lambda shape: cost_in(family, config, limits, shape)))  # fmt: skip
    return found


def _nothing_square(family: Family, dense: Shape, limits: Limits) -> UserError:
    names = ("hidden_size", "head_dim", "num_key_value_heads", "word_embed_proj_dim", "multiple_of")
    given = ["--square"] if limits.square else []
    given += [
        f"--{name.replace('_', '-')} {getattr(limits, name)}"
        for name in names
        if getattr(limits, name) is not None
    ]
    whole = dense.head_dim * dense.num_attention_heads // dense.num_key_value_heads
    shrunk = f"{8 * dense.num_attention_heads} (heads of 8, 16, ... dimensions) or of "
    tied = (
        ", and a table that stays tied cannot be as wide as the stream"
        if family.projections and limits.tie != "untie" and dense.tie_word_embeddings
        else ""
    )
    return UserError(
        f"No shape is allowed by {', '.join(given)}: the width is to be heads times head size, "
        f"so a multiple of {'' if family.rotary else shrunk}{whole} (whole heads), and "
        f"{dense.hidden_size} at most{tied}; change or leave out one of them."
    )


def _embedding_widths(
    family: Family, config: Mapping[str, Any], limits: Limits
) -> list[int | None]:
    dense = Shape.of(family, config)
    if family.projections is None or limits.tie == "untie" or not dense.tie_word_embeddings:
        return [dense.word_embed_proj_dim]
    if limits.word_embed_proj_dim is not None:
        return [limits.word_embed_proj_dim]
    full = dense.word_embed_proj_dim
    if limits.only_width:
        return [full]
    multiple = 64 if full >= 1024 else 8
    narrower = (full * quarters // 4 // multiple * multiple for quarters in (3, 2))
    return [full, *(width for width in dict.fromkeys(narrower) if 0 < width < full)]


def _squared(limits: Limits, dense: Shape, shape: Shape) -> Shape | None:
    """The shape with the width that its heads make; None where that is not allowed."""
    width = shape.num_attention_heads * shape.head_dim
    asked = limits.hidden_size
    if (asked and asked != width) or width % (limits.multiple_of or 1):
        return None
    if width > dense.hidden_size:  # heads may be wider together than the stream, as Qwen3's are
        return None
    # Hugging Face builds the projections only where the widths differ (DESIGN 3.5).
    if shape.tie_word_embeddings and shape.word_embed_proj_dim == width:
        return None
    square = shape.with_width(width)
    return square if shape.tie_word_embeddings else square.untied()


def _filled_row(
    family: Family, config: Mapping[str, Any], limits: Limits, shapes: list[Shape]
) -> list[Shape]:
    """Of shapes that rise in width the widest within the budget, and wider ones with less FFN."""
    dense = Shape.of(family, config)
    budget = limits.keep * cost_in(family, config, limits, dense)
    fitting = [shape for shape in shapes if cost_in(family, config, limits, shape) <= budget]
    found = fitting[-1:]
    if limits.only_width or limits.intermediate_size is not None or family.experts is not None:
        return found
    for shape in shapes[len(fitting) :]:
        filled = _filled(family, config, limits, shape)
        if filled is not None and filled != dense:
            found.append(filled)
    return found


def _with_groups(
    family: Family, config: Mapping[str, Any], limits: Limits, start: Shape
) -> list[Shape]:
    """Candidates of one number of KV groups, the narrowest with the whole FFN first."""
    dense = Shape.of(family, config)
    first = widest(family, config, limits, start)
    ffn_stays = limits.only_width or limits.intermediate_size is not None
    ffn_stays = ffn_stays or family.experts is not None
    if ffn_stays or (limits.hidden_size is not None and first is not None):
        return [] if first is None else [first]
    multiple = math.lcm(width_step(limits, dense), start.num_attention_heads)
    step = max(1, dense.hidden_size // 16 // multiple) * multiple
    begin = limits.hidden_size or (first.hidden_size + step if first else multiple)
    end = limits.hidden_size or dense.hidden_size
    found = [first] if first else []
    for width in range(begin, end + 1, step):
        filled = _filled(family, config, limits, start.with_width(width))
        if filled is not None:
            found.append(filled)
    return found


def _filled(
    family: Family, config: Mapping[str, Any], limits: Limits, start: Shape
) -> Shape | None:
    """`start` with the widest FFN within the budget; None below three tenths of the dense one."""
    dense = Shape.of(family, config)
    budget = limits.keep * cost_in(family, config, limits, dense)
    multiple = intermediate_multiple(dense.hidden_size, limits.tensor_parallel)
    widths = range(multiple, dense.intermediate_size, multiple)

    def cost(width: int) -> int:
        return cost_in(family, config, limits, replace(start, intermediate_size=width))

    fitting = bisect.bisect_right(widths, budget, key=cost)
    if not fitting or widths[fitting - 1] < 0.3 * dense.intermediate_size:
        return None
    return replace(start, intermediate_size=widths[fitting - 1])
