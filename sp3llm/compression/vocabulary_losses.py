"""What a model loses with fewer tokens than a text uses, by the text itself.

One forward of the dense model over a little text, encoded with each vocabulary:
whatever tokens these make of it are the dense model's too, and its distribution over those that
stay is what is left of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sp3llm.compression.job import Job, calibration_sets
from sp3llm.compression.texts import tokenizer_of
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import VOCAB
from sp3llm.models.opening import open_stream
from sp3llm.models.stream import LayeredModel, Stream, run_layer
from sp3llm.planning.windows import window_length
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.progress import tracked
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import Windows
from sp3llm.vocabulary.choosing import chosen_by
from sp3llm.vocabulary.restricting import dense_rows, restricted_checkpoint
from sp3llm.vocabulary.same_text import HeldOut, same_text
from sp3llm.vocabulary.wanted import Wanted, without_documents

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.runtime.journal import Journal

# The stage, as the journal of a run knows it.
_LOSSES = "vocabularies"
# Tokens of text, in each vocabulary: the forward over all is to cost what the gradients do.
TOKENS = 2**13
# In windows of so many at most: of more documents than long ones are of.
_WINDOW = 512


@dataclass(frozen=True)
class _Reading:
    """A little text as one vocabulary has it."""

    dense: Checkpoint
    """The dense model with that vocabulary."""
    rows: "Tensor"
    """By its token: the dense one, int64."""
    text: HeldOut
    """In dense tokens, and in its own."""


def vocabulary_losses(job: Job, journal: "Journal", progress: "Progress") -> dict[int, float]:
    """What every vocabulary of a job loses to the first, nats a dense token, by the rows of its
    tables.

    The text is like that which is calibrated on, by which all other axes are judged: beside it,
    text that only says which tokens stay would make any vocabulary that suits it look free. Where
    it was counted too it looks better than any other, as its own rare tokens were: so vocabularies
    of the same sizes are taken that all other documents would have chosen.

    What `journal` has from a run before is not found out again.
    """
    if len(job.vocabularies) < 2:
        return {vocabulary.kept.rows: 0.0 for vocabulary in job.vocabularies}
    before = journal.latest(_LOSSES)
    if before is None:
        means = [nats.mean().item() for nats in _nats(job, _readings(job), progress)]
        facts = {
            str(vocabulary.kept.rows): mean - means[0]
            for vocabulary, mean in zip(job.vocabularies, means, strict=True)
        }
        journal.save(_LOSSES, 0, facts=facts)
    else:
        facts = before.facts
    return {int(rows): loss for rows, loss in facts.items()}


def little_text(
    job: Job,
    names: str,
    tokens: int,
    exclude: frozenset[str] = frozenset(),
    words: bool = False,
) -> Windows:
    """A little of the text of some sets, in dense tokens, without documents whose content hash is
    in `exclude`; with `words` it is noted where they begin.

    Raises UserError if there is none.
    """
    length = min(_WINDOW, window_length(job.family, job.original.config, job.settings.seq_len))
    tokenizer, count = load_tokenizer(job.original.folder), max(1, tokens // length)
    draw = job.objective.training_windows
    return draw(names, tokenizer, count, length, 0, exclude, words=words)


def text_of_losses(job: Job) -> Windows:
    """The text that tells what vocabularies lose."""
    return little_text(job, calibration_sets(job.settings), TOKENS, words=True)


def _readings(job: Job) -> list[_Reading]:
    """A little text as every vocabulary has it; the first process reads it for all."""
    family, config, folder = job.family, job.original.config, job.original.folder
    tokenizer, wanted = load_tokenizer(folder), job.vocabularies[0].wanted

    def read() -> tuple[Windows, Wanted]:
        windows = text_of_losses(job)
        return windows, without_documents(wanted, folder, windows.documents)

    windows, others = job.execution.ranks.from_first(read)
    positions = families.setting(family, config, "max_position_embeddings")
    rows = families.axis_sizes(family, config)[VOCAB]
    readings = []
    for vocabulary in job.vocabularies:
        chosen = chosen_by(vocabulary.vocabulary, others, vocabulary.size)
        dense = restricted_checkpoint(job.original, family, chosen.kept)
        same = same_text(windows, tokenizer, tokenizer_of(job, chosen), positions)
        of_dense = torch.tensor(dense_rows(chosen.kept, rows))
        readings.append(_Reading(dense, of_dense, HeldOut(windows, same)))
    return readings


def _nats(job: Job, readings: list[_Reading], progress: "Progress") -> "list[Tensor]":
    """Nats a dense token, a row a window, of each reading."""
    family, execution = job.family, job.execution
    longest = max(one.text.small_tokens.shape[1] for one in readings)
    windows = len(readings[0].text.tokens)
    shared = execution.local_windows(windows, longest)
    own = [one.text.small_tokens[shared] for one in readings]
    as_dense = [
        torch.nn.functional.pad(one.rows[tokens], (0, longest - tokens.shape[1]))
        for one, tokens in zip(readings, own, strict=True)
    ]
    stream = through_layers(job, torch.cat(as_dense), "dense model, fewer tokens", progress)
    found = []
    for number, (one, tokens) in enumerate(zip(readings, own, strict=True)):
        model = LayeredModel.of(one.dense.config, family, job.objective, execution)
        hidden = stream.hidden[number * len(shared) : (number + 1) * len(shared)]
        end = Stream(hidden[:, : tokens.shape[1]], stream.calls)
        losses = job.objective.losses(model, head_tensors(one.dense, family), end, tokens)
        found.append(one.text.small_nats(execution.ranks.all_gather_rows(losses, shared, windows)))
    return found


def through_layers(job: Job, tokens: "Tensor", what: str, progress: "Progress") -> Stream:
    """The stream of the dense model of all tokens behind its last layer, of windows of its tokens
    that this process has; `what` is shown meanwhile.
    """
    dense, family, execution = job.original, job.family, job.execution
    model = LayeredModel.of(dense.config, family, job.objective, execution)
    embeddings, *layers, _ = families.groups(family, dense.config)
    stream = open_stream(model, dense.read(embeddings.parameters), tokens)
    sources = prefetch(layers, lambda group: dense.read(group.parameters), execution.device)
    for index, (_, tensors) in enumerate(tracked(progress, what, sources, 0, len(layers))):
        run_layer(model, index, tensors, [(stream, {})])
    return stream
