"""Bytes of a model's weights in the formats that it is served in. Imports no torch.

llama.cpp quantizes rows in blocks, and keeps in more bits what does not come out even: which sizes
a model is cut to decides what a format saves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp3llm.models.families import (
    INTERLEAVED,
    KEY_VALUE,
    POSITIONS,
    Family,
    count_parameters,
    groups,
    linear_modules,
    parameter_shapes,
)
from sp3llm.models.served import export_of
from sp3llm.models.shapes import Shape, resized_config


@dataclass(frozen=True)
class _Type:
    """A type of llama.cpp: weights of a row in blocks, and what a row of other lengths gets."""

    weights: int
    """Of a block."""
    bytes: int
    """Of a block, scales included."""
    otherwise: "_Type | None" = None

    def of(self, rows: int, length: int) -> int:
        """Bytes of a matrix."""
        if length % self.weights:
            return (self.otherwise or _F16).of(rows, length)
        return rows * length // self.weights * self.bytes


_F16 = _Type(1, 2)
_Q8_0 = _Type(32, 34)
_Q4_K = _Type(256, 144, otherwise=_Type(32, 22))  # or Q5_0
_Q5_K = _Type(256, 176, otherwise=_Type(32, 24))  # or Q5_1
_Q6_K = _Type(256, 210, otherwise=_Q8_0)

# bitsandbytes: a float32 for each row of an int8 matrix, and for each 64 weights of an nf4 one.
_NF4_BLOCK = 64


def formats_of(
    family: Family, config: Mapping[str, Any], shape: Shape, export_as: str = "same"
) -> dict[str, int]:
    """`format_bytes` of the model of that `config.json` once it is cut to `shape` and written as
    the class of `export_as`.
    """
    export = export_of(family, resized_config(family, config, shape), export_as)
    return format_bytes(export.family, export.config)


def format_bytes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights of the model of that `config.json`, by format.

    `bf16`; `int8` and `nf4` of bitsandbytes, but for mixtures of experts; `Q8_0` and `Q4_K_M` of
    llama.cpp, where it has the class and the model has no experts. What a file holds beside its
    weights, the tokenizer first, comes on top.
    """
    sizes = {"bf16": 2 * count_parameters(family, config)}
    if family.experts is not None:
        return sizes
    matrices = linear_modules(family, config).values()
    left = sizes["bf16"] - 2 * sum(rows * length for rows, length in matrices)
    sizes["int8"] = left + sum(rows * (length + 4) for rows, length in matrices)
    sizes["nf4"] = left + sum(
        math.ceil(rows * length / 2) + 4 * math.ceil(rows * length / _NF4_BLOCK)
        for rows, length in matrices
    )
    if family.gguf and family.task_head is None:
        sizes["Q8_0"], sizes["Q4_K_M"] = _gguf_bytes(family, config)
    return sizes


def _gguf_bytes(family: Family, config: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes in Q8_0 and in Q4_K_M, as llama.cpp's `llama-quant.cpp` chooses types."""
    shapes = parameter_shapes(family, config)
    parts = groups(family, config)
    layers = 1 + max(part.layer for part in parts)
    head = f"{family.head}.weight" if f"{family.head}.weight" in shapes else family.embedding
    few = many = 0
    for part in parts:
        for name, axes in part.parameters.items():
            shape = shapes[name]
            if len(shape) == 1 or POSITIONS in axes:
                few, many = few + 4 * math.prod(shape), many + 4 * math.prod(shape)
                continue
            many += _Q8_0.of(*shape)
            if name == head:
                kind = _Q6_K
            elif axes[0] == INTERLEAVED or (isinstance(axes[0], tuple) and KEY_VALUE in axes[0]):
                kind = _Q5_K  # queries, keys and values in one
            elif name in _finer(family, part.prefix) and _gets_more_bits(part.layer, layers):
                kind = _Q6_K
            else:
                kind = _Q4_K
            few += kind.of(*shape)
    return many, few


def _finer(family: Family, prefix: str) -> tuple[str, ...]:
    """Of a layer the matrices that get more bits in half of the layers: the values' and the one
    that the FFN writes by.
    """
    readers = family.sites[0].readers
    values = [reader for reader in readers if KEY_VALUE in family.layer[f"{reader}.weight"]]
    return tuple(f"{prefix}{name}.weight" for name in (*values[-1:], family.writers[-1]))


def _gets_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule: the first and last eighth, and every third in between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
