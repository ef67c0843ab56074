"""Labelled examples as models read them: padded token ids, and which of them are real."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Examples, a row each: texts, pairs of texts, or stretches of a document with a question.

    Slicing takes rows, by a slice or by numbers, and trims the padding to the longest of them.
    """

    input_ids: "Tensor"
    """Token ids, `(rows, tokens)`, int64, special tokens included, padded at the end."""
    attention_mask: "Tensor"
    """1 where a token is real and 0 where it is padding, `(rows, tokens)`, int64."""
    token_type_ids: "Tensor | None"
    """Which of two texts a token is of, `(rows, tokens)`, int64; None: the model does not ask."""
    labels: "Tensor | None"
    """By row a class, `(rows,)`, int64; a value, `(rows,)`, float32, where one is predicted; the
    first and the last token of an answer, `(rows, 2)`, int64, both 0 where the row holds none.
    None: there are none."""
    documents: frozenset[str]
    """Content hashes of the rows' text (`text.split.content_hash`); of a slice those of all."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of the longest of them."""
        rows, tokens = self.input_ids.shape
        return rows, tokens

    def __getitem__(self, rows: "slice | Tensor") -> "Examples":
        mask = self.attention_mask[rows]
        longest = int(mask.sum(1).max()) if len(mask) else 0

        def taken(tensor: "Tensor | None") -> "Tensor | None":
            return None if tensor is None else tensor[rows][:, :longest]

        return replace(
            self,
            input_ids=taken(self.input_ids),
            attention_mask=taken(self.attention_mask),
            token_type_ids=taken(self.token_type_ids),
            labels=None if self.labels is None else self.labels[rows],
        )

    def to(self, device: "torch.device | str") -> "Examples":
        """The same on another device."""

        def moved(tensor: "Tensor | None") -> "Tensor | None":
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            token_type_ids=moved(self.token_type_ids),
            labels=moved(self.labels),
        )

    def reread(self, ids: "Tensor") -> "Examples":
        """The same with every token id looked up in `ids`, by number the id in its place."""
        return replace(self, input_ids=ids.to(self.input_ids.device)[self.input_ids])

    def split(self, rows: int) -> "list[Examples]":
        """Batches of that many rows, the last of what is left."""
        return [self[at : at + rows] for at in range(0, len(self), rows)]

    def inputs(self) -> dict[str, Any]:
        """What a stock model is called with: everything but the labels."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            given["token_type_ids"] = self.token_type_ids
        return given

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.attention_mask.sum())

    @property
    def sha256(self) -> str:
        """SHA-256 of tokens, padding and labels with their shapes, as 64 hex digits."""
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.attention_mask, self.token_type_ids, self.labels):
            if tensor is not None:
                digest.update(repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def joined(parts: Sequence[Examples]) -> Examples:
    """The rows of all parts, one part after the other, padded alike; labels where all have them."""
    import torch
    from torch.nn import functional

    longest = max(part.shape[1] for part in parts)
    padding = torch.cat([part.input_ids[part.attention_mask == 0] for part in parts])
    fills = {"input_ids": int(padding[0]) if len(padding) else 0}

    def together(name: str) -> "Tensor | None":
        tensors = [getattr(part, name) for part in parts]
        if any(tensor is None for tensor in tensors):
            return None
        if name == "labels":
            return torch.cat(tensors)
        fill = fills.get(name, 0)
        return torch.cat(
            [functional.pad(t, (0, longest - t.shape[1]), value=fill) for t in tensors]
        )

    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    return Examples(
        **{name: together(name) for name in names},
        documents=frozenset().union(*(part.documents for part in parts)),
    )
