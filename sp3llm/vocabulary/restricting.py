"""A model restricted to the tokens that are kept: its checkpoint, and its tokenizer."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.companions import copy_companions
from sp3llm.models.families import VOCAB, Family, axis_sizes
from sp3llm.models.vocabulary_rows import with_rows
from sp3llm.runtime.files import write_json
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.vocabulary.choosing import ChosenVocabulary
from sp3llm.vocabulary.files import RestrictedFiles, check_restricted
from sp3llm.vocabulary.ids import restricted_ids
from sp3llm.vocabulary.kept import Kept


def dense_rows(kept: Kept, dense: int) -> tuple[int, ...]:
    """By row of the small tables: the row of the dense ones, of which there are `dense`.

    Rows that only pad are those of the last tokens that are not kept, rare ones or padding before:
    zeros would be a logit of zero, which models may give to no token at all.
    """
    among, padding = set(kept.old_ids), kept.rows - len(kept.old_ids)
    others = [row for row in range(dense) if row not in among]
    return (*kept.old_ids, *others[len(others) - padding :])


def shared_rows(
    dense_ids: Mapping[str, int], small_ids: Mapping[str, int], rows: int, dense: int
) -> tuple[int, ...] | None:
    """`dense_rows` of a model that was restricted before, by the ids of all tokens of both; None
    where its tokens are not some of the dense ones, or the tables, `rows` and `dense` long, do not
    hold them.
    """
    by_id = sorted(small_ids, key=small_ids.__getitem__)
    if [small_ids[token] for token in by_id] != list(range(len(by_id))):
        return None
    if not dense_ids.keys() >= small_ids.keys() or not len(by_id) <= rows <= dense:
        return None
    return dense_rows(Kept(tuple(dense_ids[token] for token in by_id), rows), dense)


def restricted_checkpoint(dense: Checkpoint, family: Family, kept: Kept) -> Checkpoint:
    """The dense model with the kept tokens alone, read from where it lies."""
    rows = dense_rows(kept, axis_sizes(family, dense.config)[VOCAB])
    config = {**restricted_ids(dense.config, kept), "vocab_size": kept.rows}
    return with_rows(dense, family, config, rows)


def instead_of(files: RestrictedFiles) -> dict[str, bytes | None]:
    """What goes in place of the files beside the weights, for `models.companions`."""
    return {**files.contents, **dict.fromkeys(files.left_out)}


def restricted_tokenizer(chosen: ChosenVocabulary, config: Mapping[str, Any]) -> Any:
    """The tokenizer of the tokens that stay; `config` is the restricted model's, which tells
    transformers the tokenizer's class.

    Raises UserError if it is not what it is to be.
    """
    vocabulary = chosen.vocabulary
    with tempfile.TemporaryDirectory() as folder:
        copy_companions(vocabulary.folder, Path(folder), instead_of(chosen.files))
        write_json(Path(folder) / "config.json", dict(config), allow_nan=True)
        tokenizer = load_tokenizer(Path(folder))
    check_restricted(tokenizer, vocabulary, chosen.kept)
    return tokenizer
