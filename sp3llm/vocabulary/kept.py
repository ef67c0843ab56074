"""Which tokens of a vocabulary stay, and the ids that they get. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# Rows of a table that kernels like: what tensor cores and quantizers in blocks divide evenly.
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Kept:
    """The tokens kept of a vocabulary, in their old order."""

    old_ids: tuple[int, ...]
    """By new id: the old one. Rising."""
    rows: int
    """Rows of the small tables, padding behind the tokens included."""

    def new_id(self, old_id: int) -> int | None:
        """The id that an old one becomes; None where its token is not kept."""
        return self._new_ids.get(old_id)

    @cached_property
    def _new_ids(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.old_ids)}


def kept_of(old_ids: Iterable[int], dense_rows: int, multiple: int = ROW_MULTIPLE) -> Kept:
    """These tokens, in tables padded to a multiple of `multiple` rows, but to no more rows than the
    dense ones have.
    """
    ordered = tuple(sorted(old_ids))
    padded = -(-len(ordered) // multiple) * multiple
    return Kept(ordered, min(padded, dense_rows))
