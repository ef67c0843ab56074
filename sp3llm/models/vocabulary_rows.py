"""A checkpoint of which some tokens are read, as if it held no others; nothing is copied."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import VOCAB, Family, groups


def with_rows(
    checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], rows: Sequence[int]
) -> Checkpoint:
    """The checkpoint with the `rows` of its embedding table, and of a head that has one of its own,
    in this order, under a `config` that has so many.

    What it computes is what the whole one does where tokens are called by the numbers of their
    rows, but that the logits of other tokens are not there.
    """
    tables = (
        name
        for group in groups(family, checkpoint.config)
        for name, axes in group.parameters.items()
        if axes[0] == VOCAB
    )
    chosen = dict.fromkeys(tables, tuple(rows))
    return replace(checkpoint, config=dict(config), rows=chosen)
