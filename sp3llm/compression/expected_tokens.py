"""Which tokens text like the user's will hold, by what the dense model expects in a little of it.

A text tells by its counts which tokens it used, and nothing of those that it might have: of the
next text's tokens that a vocabulary lacks, nearly all are names that the counted text happens not
to hold. The model has seen more. What it takes for likely, summed over a few thousand places of the
text, says which of these will come (eval/NOTES.md: as many tokens miss half as much of the text).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sp3llm.compression.job import Job
from sp3llm.compression.vocabulary_losses import (
    TOKENS,
    little_text,
    text_of_losses,
    through_layers,
)
from sp3llm.errors import UserError
from sp3llm.models.checkpoint import head_tensors
from sp3llm.models.head import next_tokens
from sp3llm.models.stream import LayeredModel
from sp3llm.runtime.progress import print_line
from sp3llm.text.sources import split_names
from sp3llm.vocabulary.choosing import ChosenVocabulary, chosen_by
from sp3llm.vocabulary.wanted import Wanted

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.runtime.journal import Journal
    from sp3llm.text.windows import Windows

# The stage, as the journal of a run knows it.
_EXPECTED = "expected"
# Of every set so many tokens of text at least: with fewer their own words are half of it.
_FEWEST_TOKENS = 2**11


def with_expected_tokens(job: Job, journal: "Journal", progress: "Progress") -> Job:
    """The job with vocabularies of as many tokens as before, chosen by what the dense model expects
    of the text as well as by what was counted there.

    The one of all tokens that the text uses stays that, unless there are others to choose from.
    What `journal` has from a run before is not found out again.
    """
    searched = len(job.vocabularies) > 1
    if not searched and all(one.size is None for one in job.vocabularies):
        return job
    if job.objective.evaluation_windows is None:  # no model of what comes next
        return job
    before = journal.latest(_EXPECTED)
    if before is None:
        expected_V = _expected(job, searched, progress)
        named = {} if expected_V is None else {"expected": expected_V}
        journal.save(_EXPECTED, 0, named)
    else:
        expected_V = before.tensors.get("expected")
    if expected_V is None:
        print_line(
            progress.console, "Too little text for --vocab-from to tell what else to expect."
        )
        return job
    wanted = replace(job.vocabularies[0].wanted, expected_V=expected_V)
    vocabularies = [_chosen_anew(one, wanted) for one in job.vocabularies]
    ids = vocabularies[0].kept.old_ids
    others = len(set(ids).difference(job.vocabularies[0].kept.old_ids))
    if others:
        print_line(
            progress.console,
            f"{others:,} of these {len(ids):,} tokens make way for others that the dense model "
            f"expects in such text; {100 * wanted.covered(ids):.2f} % of it stay one token.",
        )
    return replace(job, vocabularies=vocabularies).with_vocabulary(vocabularies[0])


def _chosen_anew(before: ChosenVocabulary, wanted: Wanted) -> ChosenVocabulary:
    """A vocabulary of as many tokens, in tables of as many rows."""
    count, rows = len(before.kept.old_ids), before.kept.rows
    chosen = chosen_by(before.vocabulary, wanted, count, keeps_used=before.keeps_used)
    return replace(chosen, kept=replace(chosen.kept, rows=rows))


def _expected(job: Job, searched: bool, progress: "Progress") -> "Tensor | None":
    """Of next tokens the share that is each one, in the mean over the sets of `--vocab-from`:
    `(V,)`, float64; None where these hold too little text.
    """
    texts = job.execution.ranks.from_first(lambda: _texts(job, searched))
    if not texts:
        return None
    windows = torch.cat([text.tokens for text in texts])
    counts_WV = _next_tokens(job, windows, progress)
    by_set = counts_WV.split([len(text.tokens) for text in texts])
    return torch.stack([counts.sum(0) / counts.sum() for counts in by_set]).mean(0)


def _texts(job: Job, searched: bool) -> "list[Windows]":
    """A little text of each set that is long enough. Where vocabularies are `searched`, it is none
    of what tells their losses, whose own words the model would expect.
    """
    exclude = text_of_losses(job).documents if searched else frozenset()
    names = split_names(job.settings.vocab_from)
    found = []
    for name in names:
        try:
            text = little_text(job, name, max(_FEWEST_TOKENS, TOKENS // len(names)), exclude)
        except UserError:  # readable it is: it was counted
            continue
        found.append(text)
    return found


def _next_tokens(job: Job, windows: "Tensor", progress: "Progress") -> "Tensor":
    """What the dense model expects next in windows, `(windows, V)`; the same on every process."""
    dense, family, execution = job.original, job.family, job.execution
    own = execution.local_windows(*windows.shape)
    stream = through_layers(job, windows[own], "dense model, expected tokens", progress)
    model = LayeredModel.of(dense.config, family, job.objective, execution)
    expected = next_tokens(model, head_tensors(dense, family), stream)
    return execution.ranks.all_gather_rows(expected, own, len(windows))
