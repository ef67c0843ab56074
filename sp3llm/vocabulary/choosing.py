"""Choose which tokens stay of a model's vocabulary, once or several times."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sp3llm.vocabulary.files import RestrictedFiles, restricted_files
from sp3llm.vocabulary.kept import ROW_MULTIPLE, Kept
from sp3llm.vocabulary.tokenizers import Vocabulary, closed, most_wanted, read_vocabulary
from sp3llm.vocabulary.wanted import Wanted

# Beside what stays in any case so many sixteenths of as many tokens as text uses are tried. More of
# them too: what it might have used is worth more than some of what it used.
_SIXTEENTHS = (20, 18, 16, 14, 12, 9)
MOST_VOCABULARIES = len(_SIXTEENTHS)
# A share that is less than any that was counted, of a token that nothing speaks for.
_LEAST = 1e-18


@dataclass(frozen=True)
class ChosenVocabulary:
    """The tokens that stay."""

    vocabulary: Vocabulary
    """The dense tokenizer's."""
    wanted: Wanted
    """What they were chosen by."""
    size: int | None
    """How many they are at most; None: all that the text uses."""
    kept: Kept
    keeps_used: bool = False
    """All that the text uses are among them, others only beside these."""

    @cached_property
    def files(self) -> RestrictedFiles:
        """What becomes of the files beside the weights: made only of what is written or loaded."""
        return restricted_files(self.vocabulary, self.kept)

    @property
    def dense_tokens(self) -> int:
        """Of the dense tokenizer."""
        return len(self.vocabulary.tokens)

    def lines(self) -> list[str]:
        """What was chosen, in a line, and what cannot come along."""
        wanted, kept = self.wanted, self.kept
        line = (
            f"Vocabulary: {self.dense_tokens:,} -> {len(kept.old_ids):,} tokens. The "
            f"{wanted.tokens:,} tokens of {', '.join(wanted.sources)} use {wanted.used:,}; "
            f"{100 * wanted.covered(kept.old_ids):.2f} % of them stay one token."
        )
        return [line, *self.files.left_out.values()]


def choose_vocabularies(
    folder: Path,
    wanted: Wanted,
    size: int | None,
    tensor_parallel: int,
    most: int,
    room: int = 0,
) -> list[ChosenVocabulary]:
    """The tokens that stay of a model folder's, `size` of them; None: all that the text uses, or,
    with `most` above one, so many vocabularies to choose from, ever smaller ones. Where there is
    room for more rows than the text uses with nothing else cut, `room`, as many stay. Their tables
    divide by `tensor_parallel` devices.

    Raises UserError if the tokenizer cannot be rewritten, or more tokens must stay.
    """
    vocabulary = read_vocabulary(folder)
    multiple = math.lcm(ROW_MULTIPLE, tensor_parallel)
    found = [chosen_by(vocabulary, wanted, size, multiple)]
    used, tokens = len(found[0].kept.old_ids), len(vocabulary.tokens)
    room = min(room // multiple * multiple, tokens)
    if size is None and room > used:
        found = [chosen_by(vocabulary, wanted, room, multiple, keeps_used=True)]
    elif size is None and most > 1:
        least = len(closed(vocabulary, ()))
        sizes = [least + (used - least) * sixteenths // 16 for sixteenths in _SIXTEENTHS[:most]]
        several = [chosen_by(vocabulary, wanted, min(one, tokens), multiple) for one in sizes]
        # Of those that fill as many rows the one with most tokens.
        found = list({one.kept.rows: one for one in reversed(several)}.values())[::-1]
    _ = found[0].files  # what cannot be rewritten is refused before any work
    return found


def chosen_by(
    vocabulary: Vocabulary,
    wanted: Wanted,
    size: int | None,
    multiple: int = ROW_MULTIPLE,
    keeps_used: bool = False,
) -> ChosenVocabulary:
    """The `size` tokens that are wanted most, in tables of a `multiple` of rows; None: all that the
    text uses. With `keeps_used` these come before any others. Where nothing speaks for any that are
    left, the tokenizer's first ones stay.

    Raises UserError as `choose_vocabularies` does.
    """
    import torch

    shares_V, counted_V = wanted.shares, wanted.counts > 0
    if size is None:
        shares_V = shares_V.where(counted_V, 0)
    else:
        if keeps_used:
            shares_V = shares_V + counted_V  # no share is as much
        ids = torch.tensor([token for token in vocabulary.tokens if token < len(shares_V)])
        shares_V[ids] += _LEAST * (1 - ids / len(shares_V))
    kept = most_wanted(vocabulary, shares_V, size, multiple)
    return ChosenVocabulary(vocabulary, wanted, size, kept, keeps_used)
