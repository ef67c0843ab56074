"""From a budget to a shape, before any weight is touched."""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sp3llm.config import CompressConfig
from sp3llm.errors import UserError
from sp3llm.families import (
    EMBEDDING,
    FFN,
    HEAD_DIM,
    POSITIONS,
    RESIDUAL,
    VOCAB,
    Family,
    axis_sizes,
    count_largest_layer,
    count_matrix_parameters,
    count_parameters,
    is_parallel,
    is_sparse,
    is_square,
    is_tied,
    key_value_heads,
    setting,
)


@dataclass(frozen=True)
class Shape:
    """The sizes that a plan may change, and those that follow from them."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    word_embed_proj_dim: int | None = None
    """Width of the embedding table, in families that have projections between it and the stream."""
    tie_word_embeddings: bool = False

    @staticmethod
    def of(family: Family, config: Mapping[str, Any]) -> "Shape":
        """The shape that a `config.json` describes."""
        sizes = axis_sizes(family, config)
        heads = setting(family, config, "num_attention_heads")
        return Shape(
            hidden_size=sizes[RESIDUAL],
            intermediate_size=sizes[FFN],
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads(family, config),
            head_dim=sizes[HEAD_DIM],
            word_embed_proj_dim=sizes[EMBEDDING] if family.projections else None,
            tie_word_embeddings=is_tied(family, config),
        )

    def with_width(self, hidden_size: int) -> "Shape":
        """The same with another hidden size."""
        return replace(self, hidden_size=hidden_size)

    def with_groups(self, num_key_value_heads: int) -> "Shape":
        """The same with fewer KV groups, each with its query heads."""
        group = self.num_attention_heads // self.num_key_value_heads
        return replace(
            self,
            num_attention_heads=group * num_key_value_heads,
            num_key_value_heads=num_key_value_heads,
        )

    def untied(self) -> "Shape":
        """The same with a head of its own, and embeddings as wide as the stream."""
        width = None if self.word_embed_proj_dim is None else self.hidden_size
        return replace(self, tie_word_embeddings=False, word_embed_proj_dim=width)

    def with_axis_of(self, other: "Shape", axis: str) -> "Shape":
        """The same with `other`'s size of the axis that a writer reads: FFN or heads."""
        if axis == FFN:
            return replace(self, intermediate_size=other.intermediate_size)
        return self.with_groups(other.num_key_value_heads)


@dataclass(frozen=True)
class Limits:
    """What a plan may do: the budget, and everything fixed by hand."""

    keep: float
    """Fraction of the dense model's count to keep; never exceeded."""
    of: str = "params"
    """What is counted: `params`, `bytes`, `flops` or `kv-cache`."""
    multiple_of: int | None = None
    """What `hidden_size` must be a multiple of; None: by `width_multiple`."""
    hidden_size: int | None = None
    """Fixed by hand."""
    intermediate_size: int | None = None
    """Fixed by hand."""
    num_key_value_heads: int | None = None
    """Fixed by hand."""
    head_dim: int | None = None
    """Fixed by hand, in families whose heads can shrink."""
    word_embed_proj_dim: int | None = None
    """Fixed by hand, in families that have it."""
    tie: str = "keep"
    """What becomes of a tied head: `keep`, `untie`, or `auto`, both to choose from."""
    square: bool = False
    """Keep `hidden_size = num_attention_heads * head_dim`, where the family does not demand it."""
    only_width: bool = False
    """Spend all of the budget on the hidden size; what is not fixed by hand stays."""
    tensor_parallel: int = 1
    """Heads, KV groups and widths stay divisible by this many devices."""
    context: int = 2048
    """Tokens of context that attention FLOPs are counted at."""
    itemsize: int = 2
    """Bytes of a weight, and of an entry of the KV cache."""


def limits_of(settings: CompressConfig, itemsize: int) -> Limits:
    """The limits that settings put on a plan.

    With `--allocate width`, which `--no-refit` implies, FFN and KV groups stay as they are; without
    the refit there are no trials, and a tie is kept.
    """
    names = {field.name for field in fields(Limits)} & {field.name for field in fields(settings)}
    limits = Limits(itemsize=itemsize, **{name: getattr(settings, name) for name in names})
    tie = "keep" if settings.tie == "auto" and not settings.refit else settings.tie
    return replace(limits, only_width=settings.allocation == "width", tie=tie)


@dataclass(frozen=True)
class Cost:
    """What a shape costs."""

    params: int
    """True parameters, tied weights once."""
    bytes: int
    """Of the weights."""
    flops: int
    """A token: two a matrix parameter (the embedding lookup is free), and attention. Of experts
    those count that a token goes through, shared ones included."""
    kv_cache: int
    """Bytes of KV cache a token."""

    def of(self, what: str) -> int:
        """The count that a budget is about."""
        return getattr(self, what.replace("-", "_"))


@dataclass(frozen=True)
class Plan:
    """The shape of the compressed model and what it counts."""

    keep_asked: float
    """Fraction that was asked for."""
    of: str
    """What it counts."""
    keep: float
    """Fraction achieved of that; never more than asked for."""
    keep_params: float
    """Fraction of the true parameters."""
    dense_parameters: int
    """True parameters before, tied weights once."""
    parameters: int
    """True parameters after, tied weights once."""
    dense_shape: Shape
    """Before."""
    shape: Shape
    """After."""
    multiple_of: int
    """What `hidden_size` is a multiple of."""
    intermediate_multiple_of: int
    """What `intermediate_size` is a multiple of, where it was cut."""

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def width_multiple(hidden_size: int, num_attention_heads: int, tensor_parallel: int = 1) -> int:
    """The number that a new hidden size must be a multiple of.

    The heads must divide it (Hugging Face's Llama rejects anything else, and other tools derive
    head sizes from the quotient). Beyond that 256 is preferred for widths of 2048 and more
    (tensor cores; llama.cpp's K-quants), 64 where the heads make 256 coarser than an eighth of
    the width, 8 for small models.
    """
    for preferred in (256, 64) if hidden_size >= 2048 else ():
        multiple = math.lcm(preferred, num_attention_heads, tensor_parallel)
        if multiple <= hidden_size // 8:
            return multiple
    return math.lcm(8, num_attention_heads, tensor_parallel)


def intermediate_multiple(hidden_size: int, tensor_parallel: int = 1) -> int:
    """The number that a new FFN width must be a multiple of: 256, or 8 for small models."""
    return math.lcm(256 if hidden_size >= 2048 else 8, tensor_parallel)


def resized_config(family: Family, config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """`config.json` of the compressed model: the dense one's own, with the new shape.

    The file is carried over key by key rather than written anew, so that RoPE scaling, sliding
    windows and whatever else a tool reads there stay as their author wrote them. `head_dim` is
    written out, as it is no longer the quotient of width and heads.
    """
    dense = asdict(Shape.of(family, config))
    written = ("head_dim", "word_embed_proj_dim")  # the classes would derive them from the width
    changed = {
        k: v for k, v in asdict(shape).items() if v != dense[k] or (k in written and v is not None)
    }
    named = {family.keys.get(k, k): v for k, v in changed.items()}
    return {**config, **{k: v for k, v in named.items() if k is not None}}


def cost_of(
    family: Family, config: Mapping[str, Any], shape: Shape, context: int = 2048, itemsize: int = 2
) -> Cost:
    """Count a shape of a model."""
    resized = resized_config(family, config, shape)
    layers = setting(family, config, "num_hidden_layers")
    params = count_parameters(family, resized)
    multiplied = count_matrix_parameters(family, resized)
    if not is_tied(family, resized):
        sizes = axis_sizes(family, resized)
        multiplied -= sizes[VOCAB] * sizes[EMBEDDING]
    if POSITIONS in (axes[0] for axes in family.embeddings.values()):
        multiplied -= axis_sizes(family, resized)[POSITIONS] * shape.hidden_size
    attention = 4 * layers * shape.num_attention_heads * shape.head_dim * context
    return Cost(
        params=params,
        bytes=params * itemsize,
        flops=2 * multiplied + attention,
        kv_cache=2 * layers * shape.num_key_value_heads * shape.head_dim * itemsize,
    )


def widest(family: Family, config: Mapping[str, Any], limits: Limits, start: Shape) -> Shape | None:
    """`start` at the largest hidden size within the budget; None where even the smallest is not.

    The width is a multiple that the heads of both the dense and the new shape divide.
    """
    dense = Shape.of(family, config)
    budget = limits.keep * _cost(family, config, limits, dense)
    if limits.hidden_size is not None:
        widths = [limits.hidden_size]
    else:
        multiple = math.lcm(_multiple(limits, dense), start.num_attention_heads)
        widths = list(range(multiple, dense.hidden_size + 1, multiple))

    def cost(width: int) -> int:
        return _cost(family, config, limits, start.with_width(width))

    fitting = bisect.bisect_right(widths, budget, key=cost)
    return start.with_width(widths[fitting - 1]) if fitting else None


def _multiple(limits: Limits, dense: Shape) -> int:
    return limits.multiple_of or width_multiple(
        dense.hidden_size, dense.num_attention_heads, limits.tensor_parallel
    )


def _stays_square(family: Family, config: Mapping[str, Any], limits: Limits) -> bool:
    return limits.square or is_square(family, config)


def _width_step(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> int:
    """What the hidden size of a chosen shape is a multiple of."""
    dense = Shape.of(family, config)
    if not _stays_square(family, config, limits):
        return _multiple(limits, dense)
    if shape.head_dim < dense.head_dim:
        return dense.num_attention_heads * math.gcd(8, shape.head_dim)
    return shape.head_dim * dense.num_attention_heads // dense.num_key_value_heads


def _cost(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> int:
    return cost_of(family, config, shape, limits.context, limits.itemsize).of(limits.of)


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
    square = _stays_square(family, config, limits)
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
    multiple = _multiple(limits, dense)
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
    if _stays_square(family, config, limits):
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
        smallest = smallest.with_width(limits.hidden_size or _multiple(limits, dense))
        raise _nothing_fits(family, config, limits, smallest)
    return found


def _nothing_fits(
    family: Family, config: Mapping[str, Any], limits: Limits, smallest: Shape
) -> UserError:
    dense = Shape.of(family, config)
    least = _cost(family, config, limits, smallest) / _cost(family, config, limits, dense)
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
            legal, key=lambda shape: _cost(family, config, limits, shape)))  # fmt: skip
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
    budget = limits.keep * _cost(family, config, limits, dense)
    fitting = [shape for shape in shapes if _cost(family, config, limits, shape) <= budget]
    found = fitting[-1:]
    if limits.only_width or limits.intermediate_size is not None or family.experts is not None:
        return found
    for shape in shapes[len(fitting) :]:
        filled = _filled(family, config, limits, shape)
        if filled is not None and filled != dense:
            found.append(filled)
    return found


def row_of(family: Family, config: Mapping[str, Any], shape: Shape) -> int:
    """Which row of candidates a shape belongs to: neighbouring rows differ by one step."""
    if not is_square(family, config):
        return -shape.num_key_value_heads
    dense = Shape.of(family, config)
    if shape.head_dim == dense.head_dim:
        return -1
    if not shape.tie_word_embeddings:
        return 0
    return (dense.word_embed_proj_dim or 0) - (shape.word_embed_proj_dim or 0)


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
    multiple = math.lcm(_multiple(limits, dense), start.num_attention_heads)
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
    budget = limits.keep * _cost(family, config, limits, dense)
    multiple = intermediate_multiple(dense.hidden_size, limits.tensor_parallel)
    widths = range(multiple, dense.intermediate_size, multiple)

    def cost(width: int) -> int:
        return _cost(family, config, limits, replace(start, intermediate_size=width))

    fitting = bisect.bisect_right(widths, budget, key=cost)
    if not fitting or widths[fitting - 1] < 0.3 * dense.intermediate_size:
        return None
    return replace(start, intermediate_size=widths[fitting - 1])


def shrinks_heads(family: Family, config: Mapping[str, Any], limits: Limits) -> bool:
    """Whether heads lose dimensions in step with the width, and none goes whole."""
    return _stays_square(family, config, limits) and not family.rotary


def learnable(family: Family, config: Mapping[str, Any], shapes: list[Shape]) -> list[Shape]:
    """Of the candidates those that a learned mask chooses from: which width, FFN and number of KV
    groups it finds; ties and embedding widths are as in the first.
    """
    first, dense = shapes[0], Shape.of(family, config)
    heads_shrink = any(shape.head_dim != dense.head_dim for shape in shapes)
    return [
        shape
        for shape in shapes
        if shape.tie_word_embeddings == first.tie_word_embeddings
        and (shape.word_embed_proj_dim == first.word_embed_proj_dim or not family.projections
             or not first.tie_word_embeddings)
        and not (heads_shrink and shape.num_key_value_heads != dense.num_key_value_heads)
    ]  # fmt: skip


def nearest(shapes: list[Shape], sizes: Mapping[str, float]) -> Shape:
    """The shape whose sizes, `sizes` by field, are off by the smallest factors; what no shape
    reaches counts as what the nearest does.
    """
    found = {name: [getattr(shape, name) for shape in shapes] for name in sizes}
    wanted = {n: min(max(size, min(found[n])), max(found[n])) for n, size in sizes.items()}

    def distance(shape: Shape) -> float:
        return sum(math.log(getattr(shape, name) / size) ** 2 for name, size in wanted.items())

    return min(shapes, key=distance)


def plan_of(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> Plan:
    """The plan that a chosen shape makes."""
    dense_shape = Shape.of(family, config)
    dense, small = (
        cost_of(family, config, s, limits.context, limits.itemsize) for s in (dense_shape, shape)
    )
    return Plan(
        keep_asked=limits.keep,
        of=limits.of,
        keep=small.of(limits.of) / dense.of(limits.of),
        keep_params=small.params / dense.params,
        dense_parameters=dense.params,
        parameters=small.params,
        dense_shape=dense_shape,
        shape=shape,
        multiple_of=_width_step(family, config, limits, shape),
        intermediate_multiple_of=intermediate_multiple(
            dense_shape.hidden_size, limits.tensor_parallel
        ),
    )


@dataclass(frozen=True)
class Needs:
    """What a run will need, bytes, estimated from shapes alone; none of it grows with depth but
    the disk.
    """

    streams: int
    """Residual streams of all windows, wherever `--streams` puts them."""
    working: int
    """Largest layer in both sizes with its Gram matrices, on the device that computes."""
    disk: int
    """Of the compressed weights."""
    kept: int
    """On disk while it runs, for the run to be continued after a kill."""
    token: int
    """What the activations of one token take in a layer."""


def needs_of(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    samples: int,
    eval_samples: int,
    seq_len: int,
    itemsize: int,
    compute_itemsize: int,
) -> Needs:
    """Estimate the memory and disk of `sp3llm compress`.

    The first pass holds calibration and evaluation streams; the second the dense stream before and
    between the writers of a layer, the small one and what attention's writer reads. Of a layer
    there are the dense weights, the next layer's, those placed to run and the small ones, made in
    float64. Gram matrices are float64: one to fit and one held back, their sum where something is
    chosen, and a factor or an inverse, made in place; at the end of a layer products of them. The
    basis takes second moments and metrics of four groups of sites. On disk lie a shard of weights
    twice, every layer's input for the 8192 tokens (one window at least) whose
    gradients the basis is made from, and the streams as they were after two layers, and a third
    while it is saved.
    """
    dense = Shape.of(family, config)
    wide, narrow = dense.hidden_size, shape.hidden_size
    depth = setting(family, config, "num_hidden_layers")
    traced = min(samples, max(1, 8192 // seq_len)) * (depth + 1)
    heads = dense.num_attention_heads * dense.head_dim
    first = (samples + eval_samples) * wide
    second = samples * ((1 + len(family.sites[1:])) * wide + narrow + heads)
    streams = max(first, second) * seq_len * compute_itemsize
    layer = count_largest_layer(family, config)
    table = axis_sizes(family, config)[VOCAB] * wide
    # The only writers that are not fitted are experts'.
    is_fitted = not all(is_sparse(family, config, index) for index in range(depth))
    widest_input = max(dense.intermediate_size if is_fitted else 0, heads)
    if is_parallel(family, config):  # all writers in one regression
        widest_input = dense.intermediate_size + heads
    basis = 8 * (24 if family.centred else 14) * wide**2
    grams = 8 * (7 * widest_input**2 + 6 * widest_input * narrow)
    # What heads are cut by is kept for all layers.
    of_heads = 8 * 3 * depth * heads * dense.head_dim if is_square(family, config) else 0
    layers = layer * (3 * itemsize + compute_itemsize)
    weights = count_parameters(family, resized_config(family, config, shape)) * itemsize
    kept = 3 * (first if first > second else samples * (wide + narrow)) * seq_len
    return Needs(
        streams=streams,
        working=of_heads
        + max(layers + max(grams, basis, 8 * layer), table * (2 * itemsize + compute_itemsize)),
        disk=weights,
        kept=min(weights, 2 * 10**9)
        + (traced * wide * seq_len + kept) * compute_itemsize
        + 2 * 8 * 9 * wide**2,
        token=4 * (8 * wide + 4 * dense.intermediate_size + 4 * heads),
    )


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
