"""What a plan may do, and the plan that a chosen shape makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family, is_square
from sp3llm.models.shapes import Cost, Shape, cost_of
from sp3llm.options import COUNTS, CompressConfig

# What sizes are multiples of, in models at least so wide, where the heads do not make it coarse:
# 256 for tensor cores and llama.cpp's K-quants, or 64; 32 for its other formats, which leave rows
# of other lengths in 16 bits (`models.formats`). In smaller models all of them are coarse.
_LARGE_WIDTH, _SMALL_WIDTH = 2048, 512
_LARGE_MULTIPLE, _FINER_MULTIPLE, _BLOCK, SMALL_MULTIPLE = 256, 64, 32, 8
# Coarser than this part of the width is too coarse to spend a budget in.
_COARSEST = 8
# Heads shrink in steps of this many dimensions, as small widths do.
HEAD_DIM_STEP = 8
# Encoders' heads and widths are small, and so are their steps.
_ENCODER_HEAD_DIM_STEP = 4
_BY_HAND = (
    *("hidden_size", "intermediate_size", "num_key_value_heads", "num_hidden_layers"),
    *("head_dim", "word_embed_proj_dim"),
)


@dataclass(frozen=True)
class Limits:
    """What a plan may do: the budget, and everything fixed by hand."""

    keep: float
    """Fraction of the dense model's count to keep; never exceeded."""
    of: str = "params"
    """What is counted, one of `options.COUNTS`."""
    multiple_of: int | None = None
    """What `hidden_size` must be a multiple of; None: by `width_multiple`."""
    hidden_size: int | None = None
    """Fixed by hand."""
    intermediate_size: int | None = None
    """Fixed by hand."""
    num_key_value_heads: int | None = None
    """Fixed by hand."""
    kv_heads: str = "drop"
    """What becomes of key-value heads that go, one of `options.KV_HEADS`."""
    num_hidden_layers: int | None = None
    """Fixed by hand."""
    head_dim: int | None = None
    """Fixed by hand, in families whose heads can shrink."""
    word_embed_proj_dim: int | None = None
    """Fixed by hand, in families that have it."""
    vocab_rows: int | None = None
    """Rows of the tables with one for every token; None: as many as there are."""
    tie: str = "keep"
    """What becomes of a tied head: `keep`, `untie`, or `auto`, both to choose from."""
    square: bool = False
    """Keep `hidden_size = num_attention_heads * head_dim`, where the family does not demand it."""
    only_width: bool = False
    """Spend all of the budget on the hidden size; what is not fixed by hand stays."""
    every_layer: bool = False
    """Search among shapes with all layers only."""
    tensor_parallel: int = 1
    """Heads, KV groups and widths stay divisible by this many devices."""
    context: int = 2048
    """Tokens of context that attention FLOPs are counted at."""
    itemsize: int = 2
    """Bytes of a weight, and of an entry of the KV cache."""
    export_as: str = "same"
    """The class that the compressed model is written as: `auto`, `same` or `llama`."""

    @property
    def by_hand(self) -> bool:
        """Whether a size is fixed by hand, or the tie broken."""
        return self.tie == "untie" or any(getattr(self, name) is not None for name in _BY_HAND)


def limits_of(settings: CompressConfig, itemsize: int) -> Limits:
    """The limits that settings put on a plan.

    With `--allocate width`, which `--no-refit` implies, FFN, KV groups and layers stay as they are;
    without the refit there are no trials, and a tie is kept. A learned mask keeps every layer.
    """
    names = {field.name for field in fields(Limits)} & {field.name for field in fields(settings)}
    limits = Limits(itemsize=itemsize, **{name: getattr(settings, name) for name in names})
    tie = "keep" if settings.tie == "auto" and not settings.refit else settings.tie
    only_width, every_layer = settings.allocation == "width", settings.mask == "learned"
    return replace(limits, only_width=only_width, every_layer=every_layer, tie=tie)


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


def head_dim_step(family: Family) -> int:
    """Steps of dimensions that heads shrink in."""
    return HEAD_DIM_STEP if family.task_head is None else _ENCODER_HEAD_DIM_STEP


def width_multiple(hidden_size: int, num_attention_heads: int, tensor_parallel: int = 1) -> int:
    """The number that a new hidden size must be a multiple of, for a dense model of that width.

    The heads must divide it (Hugging Face's Llama rejects anything else, and other tools derive
    head sizes from the quotient). Beyond that 256 is preferred for widths of 2048 and more, 64
    where the heads make 256 coarser than an eighth of the width, 32 for widths of 512 and more on
    the same condition, 8 for small models.
    """
    for preferred in _preferred(hidden_size):
        multiple = math.lcm(preferred, num_attention_heads, tensor_parallel)
        if multiple <= hidden_size // _COARSEST:
            return multiple
    return math.lcm(SMALL_MULTIPLE, num_attention_heads, tensor_parallel)


def intermediate_multiple(hidden_size: int, tensor_parallel: int = 1) -> int:
    """The number that a new FFN width must be a multiple of: 256 in models 2048 wide and more, 32
    from a width of 512 on, 8 in small ones.
    """
    preferred, *_ = (*_preferred(hidden_size), SMALL_MULTIPLE)
    return math.lcm(preferred, tensor_parallel)


def _preferred(hidden_size: int) -> tuple[int, ...]:
    """Multiples that are wanted in a model that wide, where they are not coarse, the best first."""
    if hidden_size >= _LARGE_WIDTH:
        return (_LARGE_MULTIPLE, _FINER_MULTIPLE)
    return (_BLOCK,) if hidden_size >= _SMALL_WIDTH else ()


def width_step(limits: Limits, dense: Shape) -> int:
    """What the hidden size must be a multiple of: as asked, or by `width_multiple`."""
    return limits.multiple_of or width_multiple(
        dense.hidden_size, dense.num_attention_heads, limits.tensor_parallel
    )


def stays_square(family: Family, config: Mapping[str, Any], limits: Limits) -> bool:
    """Whether `hidden_size` must stay heads times head size, by the family or by hand."""
    return limits.square or is_square(family, config)


def _width_step(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> int:
    """What the hidden size of a chosen shape is a multiple of, for the record.

    Under `stays_square` that is a step of all heads' dimensions, or a whole KV group of heads.
    """
    dense = Shape.of(family, config)
    if not stays_square(family, config, limits):
        return width_step(limits, dense)
    if shape.head_dim < dense.head_dim:
        return dense.num_attention_heads * math.gcd(head_dim_step(family), shape.head_dim)
    return shape.head_dim * dense.num_attention_heads // dense.num_key_value_heads


def cost_within(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> Cost:
    """What a shape costs at the context and itemsize of the limits, in the class that the model is
    written as. The dense shape is the dense model, whose class stays.
    """
    export_as = "same" if shape == Shape.of(family, config) else limits.export_as
    return cost_of(family, config, shape, limits.context, limits.itemsize, export_as)


def cost_in(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> int:
    """What a shape counts, of what the budget is about: parameters, bytes, FLOPs a token, or bytes
    of KV cache a token (`limits.of`).
    """
    return cost_within(family, config, limits, shape).of(limits.of)


def check_count(family: Family, limits: Limits) -> None:
    """Raise UserError where a model has nothing of what is to be counted."""
    missing = "encoder" if family.task_head is None else "kv-cache"
    if limits.of == missing:
        others = ", ".join(count for count in COUNTS if count != missing)
        raise UserError(
            f"Expected --of {others} for a {family.architecture}, which has no "
            f"{missing.replace('kv-', 'KV ')}, found {missing}: choose another."
        )


def shrinks_heads(family: Family, config: Mapping[str, Any], limits: Limits) -> bool:
    """Whether heads lose dimensions in step with the width, and none goes whole."""
    return stays_square(family, config, limits) and not family.rotary


def plan_of(family: Family, config: Mapping[str, Any], limits: Limits, shape: Shape) -> Plan:
    """The plan that a chosen shape makes."""
    dense_shape = Shape.of(family, config)
    dense, small = (cost_within(family, config, limits, s) for s in (dense_shape, shape))
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
