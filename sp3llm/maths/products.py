"""Matrix products for second moments: symmetric ones, and ones on units for bfloat16. Tensors only.

Shape suffixes: N tokens, P and Q columns.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

# Panels a symmetric product is taken in: 4 leave out three eighths of the work.
_PANELS = 4


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def widened(x: Tensor) -> Tensor:
    """A copy that is at least float32, to go on with in place: on a CPU the memory for one more
    costs as much as what is computed.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def operand(x: Tensor) -> Tensor:
    """As products take it: bfloat16 as it is, float16, whose range sums soon leave, as float32."""
    return x.float() if x.dtype == torch.float16 else x


def symmetric_product(left_NP: Tensor, right_NP: Tensor) -> Tensor:
    """`left^T right`, `(P, P)`, where that is symmetric: only the blocks on and above the diagonal
    are computed. In the wider of the two dtypes, float32 at least; see `product`.
    """
    return _symmetric(_operands(left_NP, right_NP))


def rounded_products(x_NP: Tensor, y_NQ: Tensor, weights_N: Tensor) -> tuple[Tensor, ...]:
    """Of tokens rounded to bfloat16 and their float32 weights: `x^T x`, `x^T y`, `x^T w`, `y^T w`,
    and `|y|^2`; float32, the last float64. See `product`; all is made ready for it once.
    """
    of_x, of_y = (_operands(tokens, tokens) for tokens in (x_NP.bfloat16(), y_NQ.bfloat16()))
    x_NP, y_NQ = of_x.rights[0], of_y.rights[0]
    wide_NQ = widen(y_NQ)
    return (
        _symmetric(of_x),
        replace(of_x, rights=of_y.rights).product(slice(None), slice(None)),
        product(weights_N[:, None], x_NP)[0],
        product(weights_N[:, None], y_NQ)[0],
        # Summed over all in float64 it takes ten times as long.
        torch.linalg.vecdot(wide_NQ, wide_NQ).sum(dtype=torch.float64),
    )


def product(left_NP: Tensor, right_NQ: Tensor) -> Tensor:
    """`left^T right`, `(P, Q)`, in the wider of the two dtypes, float32 at least.

    Two bfloat16 numbers have an exact product in float32, and GPUs and recent CPUs have units that
    sum such products several times as fast as float32's own: bfloat16 operands go there as they
    are. A float32 operand goes there as the sum of two bfloat16 numbers, where the other is
    bfloat16, and on a GPU always (`split_product`). Elsewhere nothing is rounded.
    """
    return _operands(left_NP, right_NQ).product(slice(None), slice(None))


def multiply(left_PN: Tensor, right_NQ: Tensor) -> Tensor:
    """`left right`, `(P, Q)`, of one dtype, where a result that is off by 2^-17 of its operands is
    as good: on a GPU float32 operands go to the units for bfloat16, as `product` has it.
    """
    return product(left_PN.mT, right_NQ) if right_NQ.is_cuda else left_PN @ right_NQ


@dataclass(frozen=True)
class _Operands:
    """Two operands as the sums of the pieces that are multiplied."""

    lefts: list[Tensor]
    rights: list[Tensor]
    multiply: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype
    """Of the product."""

    def product(self, left_columns: slice, right_columns: slice) -> Tensor:
        """`left^T right` of some columns of each.

        Of four products of pieces the least, that of the two low ones, is left out.
        """
        lefts = [piece[:, left_columns].T for piece in self.lefts]
        rights = [piece[:, right_columns] for piece in self.rights]
        total = self.multiply(lefts[0], rights[0])
        for low in lefts[1:]:
            total += self.multiply(low, rights[0])
        for low in rights[1:]:
            total += self.multiply(lefts[0], low)
        return total


def _symmetric(operands: _Operands) -> Tensor:
    """`left^T right`, `(P, P)`, where it is symmetric."""
    size = operands.rights[0].shape[1]
    product_PP = operands.rights[0].new_empty(size, size, dtype=operands.dtype)
    bounds = [size * panel // _PANELS for panel in range(_PANELS + 1)]
    for start, end in pairwise(bounds):
        product_PP[start:end, start:] = operands.product(slice(start, end), slice(start, None))
        product_PP[end:, start:end] = product_PP[start:end, end:].T
    return product_PP


def _operands(left_NP: Tensor, right_NQ: Tensor) -> _Operands:
    """How a product of the two is taken; see `product`."""
    dtypes = {left_NP.dtype, right_NQ.dtype}
    wide = torch.promote_types(torch.promote_types(*(left_NP.dtype, right_NQ.dtype)), torch.float32)
    splits = torch.bfloat16 in dtypes or right_NQ.is_cuda
    if wide == torch.float64 or not splits:
        return _Operands([left_NP.to(wide)], [right_NQ.to(wide)], torch.mm, wide)
    if right_NQ.is_cuda:
        return _split(left_NP, right_NQ, _mixed_product)
    split = _split(left_NP, right_NQ, _product_on_cpu)
    lefts = [piece.float() for piece in split.lefts]
    rights = lefts if split.rights is split.lefts else [piece.float() for piece in split.rights]
    return _Operands(lefts, rights, _product_on_cpu, torch.float32)


def split_product(
    left_NP: Tensor, right_NQ: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`left^T right` from products of bfloat16 operands, summed in float32 by `multiply`.

    A float32 number is the sum of two bfloat16 numbers to 2^-17 of itself; of the four products
    the least, 2^-16 of the first, is left out. Errors are random and average over tokens. A
    bfloat16 operand is exact as it is.
    """
    return _split(left_NP, right_NQ, multiply).product(slice(None), slice(None))


def _split(
    left_NP: Tensor, right_NQ: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> _Operands:
    lefts = _pieces(left_NP)
    rights = lefts if right_NQ is left_NP else _pieces(right_NQ)
    return _Operands(lefts, rights, multiply, torch.float32)


def _pieces(x: Tensor) -> list[Tensor]:
    """One or two bfloat16 tensors whose sum `x` is, to 2^-17 of itself."""
    if x.dtype == torch.bfloat16:
        return [x]
    high = x.bfloat16()
    return [high, (x.float() - high.float()).bfloat16()]


def _mixed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left right` of bfloat16 matrices, float32, on a GPU."""
    if not _has_mixed_products():
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


@functools.cache
def _has_mixed_products() -> bool:
    """Whether this torch multiplies bfloat16 into float32 on a GPU (2.8 and later do)."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)


def _product_on_cpu(left: Tensor, right: Tensor) -> Tensor:
    """`left right` of bfloat16 numbers that are stored as float32, on a CPU, where torch has no
    product of its own from bfloat16 into float32.
    """
    with _bfloat16_units():
        return left @ right


@contextmanager
def _bfloat16_units() -> Iterator[None]:
    """Let products of float32 matrices use the CPU's units for bfloat16, where it has any: exact
    for operands that are bfloat16 numbers.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # before torch 2.9
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
