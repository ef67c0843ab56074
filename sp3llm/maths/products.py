"""Matrix products for second moments: symmetric ones, and ones for tensor cores. Tensors only.

Shape suffixes: N tokens, P and Q columns.
"""

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# Panels a symmetric product is taken in: 4 leave out three eighths of the work.
_PANELS = 4


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def symmetric_product(left_NP: Tensor, right_NP: Tensor) -> Tensor:
    """`left^T right`, `(P, P)`, where that is symmetric: only the blocks on and above the diagonal
    are computed. In the wider of the two dtypes, float32 at least.
    """
    size = right_NP.shape[1]
    wide = torch.promote_types(left_NP.dtype, right_NP.dtype)
    product_PP = right_NP.new_empty(size, size, dtype=torch.promote_types(wide, torch.float32))
    bounds = [size * panel // _PANELS for panel in range(_PANELS + 1)]
    for start, end in pairwise(bounds):
        product_PP[start:end, start:] = product(left_NP[:, start:end], right_NP[:, start:])
        product_PP[end:, start:end] = product_PP[start:end, end:].T
    return product_PP


def product(left_NP: Tensor, right_NQ: Tensor) -> Tensor:
    """`left^T right`, `(P, Q)`, in the wider of the two dtypes, float32 at least.

    On a GPU the operands go to its tensor cores as sums of bfloat16 numbers (`split_product`),
    which is an order of magnitude faster than float32 there.
    """
    wide = torch.promote_types(left_NP.dtype, right_NQ.dtype)
    if right_NQ.is_cuda and wide != torch.float64 and _has_mixed_products():
        return split_product(left_NP, right_NQ, _mixed_product)
    wide = torch.promote_types(wide, torch.float32)
    return left_NP.to(wide).T @ right_NQ.to(wide)


def split_product(
    left_NP: Tensor, right_NQ: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`left^T right` from products of bfloat16 operands, summed in float32 by `multiply`.

    A float32 number is the sum of two bfloat16 numbers to 2^-17 of itself; of the four products
    the least, 2^-16 of the first, is left out. Errors are random and average over tokens, where
    those of a plain bfloat16 product, 2^-9, are too large for a Gram matrix that is to be
    inverted. A bfloat16 operand is exact as it is.
    """
    lefts, rights = _pieces(left_NP), _pieces(right_NQ)
    total = multiply(lefts[0].T, rights[0])
    for low in lefts[1:]:
        total += multiply(low.T, rights[0])
    for low in rights[1:]:
        total += multiply(lefts[0].T, low)
    return total


def _pieces(x: Tensor) -> list[Tensor]:
    """One or two bfloat16 tensors whose sum `x` is, to 2^-17 of itself."""
    if x.dtype == torch.bfloat16:
        return [x]
    high = x.bfloat16()
    return [high, (x.float() - high.float()).bfloat16()]


def _mixed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left right` of bfloat16 matrices, float32, on a GPU."""
    return torch.mm(left, right, out_dtype=torch.float32)


@functools.cache
def _has_mixed_products() -> bool:
    """Whether this torch multiplies bfloat16 into float32 (2.8 and later do)."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)
