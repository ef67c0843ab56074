"""From a budget to widths, before any weight is touched."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sp3llm.errors import UserError
from sp3llm.families import (
    HEAD_DIM,
    RESIDUAL,
    Family,
    axis_sizes,
    count_parameters,
    setting,
)


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
    dense_hidden_size: int
    """`hidden_size` before."""
    hidden_size: int
    """`hidden_size` after."""
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


def resized_config(family: Family, config: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """`config.json` of the compressed model: the dense one's own, with the new width.

    The file is carried over key by key rather than written anew, so that RoPE scaling, sliding
    windows and whatever else a tool reads there stay as their author wrote them. `head_dim` is
    written out, as it is no longer the quotient of width and heads.
    """
    head_dim = axis_sizes(family, config)[HEAD_DIM]
    return {**config, "hidden_size": hidden_size, "head_dim": head_dim}


def plan_width(
    family: Family, config: Mapping[str, Any], keep: float, multiple_of: int | None = None
) -> Plan:
    """The widest hidden size whose true parameter count is within `keep` of the dense one.

    Raises UserError if no width fits.
    """
    dense_width = axis_sizes(family, config)[RESIDUAL]
    heads = setting(family, config, "num_attention_heads")
    multiple = multiple_of or width_multiple(dense_width, heads)
    if multiple % heads:
        raise UserError(
            f"Expected --multiple-of to be a multiple of the {heads} attention heads, which must "
            f"divide the hidden size, found {multiple}: use {math.lcm(multiple, heads)}."
        )
    dense = count_parameters(family, config)
    widths = range(multiple, dense_width, multiple)
    counts = {k: count_parameters(family, resized_config(family, config, k)) for k in widths}
    fitting = [k for k, count in counts.items() if count <= keep * dense]
    if not fitting:
        if not counts:
            raise UserError(
                f"The hidden size {dense_width} cannot be cut in multiples of {multiple}: set "
                f"--multiple-of to a smaller multiple of the {heads} attention heads."
            )
        raise UserError(
            f"No shape keeps {keep:.4g} of the {dense:,} parameters: the smallest hidden size, "
            f"{multiple}, keeps {counts[multiple] / dense:.4f}; raise --keep to at least that."
        )
    hidden_size = max(fitting)
    return Plan(
        keep_params_asked=keep,
        keep_params=counts[hidden_size] / dense,
        dense_parameters=dense,
        parameters=counts[hidden_size],
        dense_hidden_size=dense_width,
        hidden_size=hidden_size,
        multiple_of=multiple,
    )
