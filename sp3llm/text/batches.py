"""Rows of a batch, be it token ids of packed windows or padded examples."""

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from sp3llm.text.examples import Examples

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "Tensor | Examples"
"""Packed windows, or padded rows."""


def rows_of(batch: "Batch", rows: "slice | Tensor") -> "Batch":
    """Some rows, as long as before: padding is not trimmed, so that streams of parts of a batch lie
    where those of the whole do.
    """
    if not isinstance(batch, Examples):
        return batch[rows]
    tensors = {
        name: None if (tensor := getattr(batch, name)) is None else tensor[rows]
        for name in ("input_ids", "attention_mask", "token_type_ids", "labels")
    }
    return replace(batch, **tensors)


def first_tokens_of(windows: "Batch", count: int) -> "Batch":
    """Windows cut to so many tokens; rows of examples are short already."""
    return windows if isinstance(windows, Examples) else windows[:, :count]


def token_ids(batch: "Batch") -> "Tensor":
    """Ids of all tokens, padding among them."""
    return batch.input_ids if isinstance(batch, Examples) else batch


def real_tokens(batch: "Batch") -> int:
    """How many tokens of a batch are no padding."""
    return batch.tokens if isinstance(batch, Examples) else batch.numel()
