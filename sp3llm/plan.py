"""From a budget to a shape, before any weight is touched."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.families import (
    FFN,
    HEAD_DIM,
    RESIDUAL,
    Family,
    axis_sizes,
    count_parameters,
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

    @staticmethod
    def of(family: Family, config: Mapping[str, Any]) -> "Shape":
        """The shape that a `config.json` describes."""
        sizes = axis_sizes(family, config)
        heads = setting(family, config, "num_attention_heads")
        return Shape(
            hidden_size=sizes[RESIDUAL],
            intermediate_size=sizes[FFN],
            num_attention_heads=heads,
            num_key_value_heads=setting(family, config, "num_key_value_heads") or heads,
            head_dim=sizes[HEAD_DIM],
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

    def with_axis_of(self, other: "Shape", axis: str) -> "Shape":
        """The same with `other`'s size of the axis that a writer reads: FFN or heads."""
        if axis == FFN:
            return replace(self, intermediate_size=other.intermediate_size)
        return self.with_groups(other.num_key_value_heads)


@dataclass(frozen=True)
class Plan:
    """The shape of the compressed model and what it counts."""

    keep_params_asked: float
    """Fraction of the dense checkpoint's parameters that was asked for."""
    keep_params: float
    """Fraction achieved; never more than asked for."""
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

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def width_multiple(hidden_size: int, num_attention_heads: int) -> int:
    """The number that a new hidden size must be a multiple of.

    The heads must divide it (Hugging Face's Llama rejects anything else, and other tools derive
    head sizes from the quotient). Beyond that 256 is preferred for widths of 2048 and more
    (tensor cores; llama.cpp's K-quants), 64 where the heads make 256 coarser than an eighth of
    the width, 8 for small models.
    """
    for preferred in (256, 64) if hidden_size >= 2048 else ():
        multiple = math.lcm(preferred, num_attention_heads)
        if multiple <= hidden_size // 8:
            return multiple
    return math.lcm(8, num_attention_heads)


def resized_config(family: Family, config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """`config.json` of the compressed model: the dense one's own, with the new shape.

    The file is carried over key by key rather than written anew, so that RoPE scaling, sliding
    windows and whatever else a tool reads there stay as their author wrote them. `head_dim` is
    written out, as it is no longer the quotient of width and heads.
    """
    dense = asdict(Shape.of(family, config))
    changed = {k: v for k, v in asdict(shape).items() if v != dense[k] or k == "head_dim"}
    return {**config, **changed}


def plan_width(
    family: Family, config: Mapping[str, Any], keep: float, multiple_of: int | None = None
) -> Plan:
    """The widest hidden size whose true parameter count is within `keep` of the dense one.

    Raises UserError if no width fits.
    """
    dense_shape = Shape.of(family, config)
    heads = dense_shape.num_attention_heads
    multiple = multiple_of or width_multiple(dense_shape.hidden_size, heads)
    if multiple % heads:
        raise UserError(
            f"Expected --multiple-of to be a multiple of the {heads} attention heads, which must "
            f"divide the hidden size, found {multiple}: use {math.lcm(multiple, heads)}."
        )
    dense = count_parameters(family, config)
    widths = range(multiple, dense_shape.hidden_size, multiple)
    shapes = [dense_shape.with_width(width) for width in widths]
    counts = {s: count_parameters(family, resized_config(family, config, s)) for s in shapes}
    fitting = [shape for shape, count in counts.items() if count <= keep * dense]
    if not counts:
        raise UserError(
            f"The hidden size {dense_shape.hidden_size} cannot be cut in multiples of {multiple}: "
            f"set --multiple-of to a smaller multiple of the {heads} attention heads."
        )
    if not fitting:
        raise UserError(
            f"No shape keeps {keep:.4g} of the {dense:,} parameters: the smallest hidden size, "
            f"{multiple}, keeps {counts[shapes[0]] / dense:.4f}; raise --keep to at least that."
        )
    return Plan(
        keep_params_asked=keep,
        keep_params=counts[fitting[-1]] / dense,
        dense_parameters=dense,
        parameters=counts[fitting[-1]],
        dense_shape=dense_shape,
        shape=fitting[-1],
        multiple_of=multiple,
    )
