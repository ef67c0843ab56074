"""Choose a shape: predict what every candidate loses, and try the few that matter.

The pass over the dense model says what each axis loses (`compression.predicting`), for all
candidates at once. What it cannot say is how much of that later layers mend, which is another share
for the stream than for units: a few trials, refits on a little of the calibration text side by side
beside one dense stream, set the two scales (`planning.search`), and have the last word on
themselves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from sp3llm.compression.job import Job, kept_neurons_of, refitter_of, same_basis_for_all

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.compression.dense_runs import DenseRuns
    from sp3llm.compression.projection import Projection
    from sp3llm.compression.statistics import Moments
    from sp3llm.compression.trials import Trial
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.search import Findings, Losses
    from sp3llm.runtime.journal import Journal
    from sp3llm.text.examples import Examples

FEWEST_WINDOWS = 4
"""Fewer calibration windows, or rows, leave a trial nothing to be scored on."""
# A trial sees windows this long at most.
_TRIAL_TOKENS = 512
# It fits on so many tokens for each input of the widest matrix, and on so many windows at least; so
# many more choose the ridges, and so many at least tell what the shape loses. More windows fit, and
# more tell, while they cost little: tokens times the square of the hidden size.
_TOKENS_AN_INPUT, _FEWEST_FITTED = 4, 12
_HELD_BACK, _UNSEEN = 2, 12
_LITTLE = 2**30
# What the journal knows trials as; a run of before may have left others, "trials on both sides".
_TRIALS = "trials by the last windows"


@dataclass(frozen=True)
class _Search:
    """What is known of the candidates so far."""

    job: Job
    moments: "Moments"
    calibration: "Tensor | Examples"
    """All calibration windows, `(windows, tokens)`, or rows, which bases are made from."""
    journal: "Journal"
    vocabularies: "Mapping[int, float]"
    """What fewer tokens lose, nats a token, by rows of the tables."""
    trials: "dict[Shape, Trial | None]"
    """By shape, in the order of the trials, those of an earlier run among them; None: nothing is
    lost but by fewer tokens."""
    projections: "dict[tuple, Projection]" = field(default_factory=dict)
    """Of shapes that are tried, by all sizes that a projection depends on: shapes that differ in
    the FFN share one."""
    projected: "dict[tuple, float]" = field(default_factory=dict)
    """What these leave out, nats a token, before any scale."""
    runs: "DenseRuns" = field(default_factory=dict)
    """What the dense layers leave of the text of trials, for the rounds after the first."""


def predicts(job: Job) -> bool:
    """Whether there is a shape to choose, by what candidates are predicted to lose."""
    return len(job.shapes) > 1 and job.settings.mask != "learned"


def judging_windows(job: Job, calibration: "Tensor | Examples") -> int:
    """How many of the last calibration windows, or rows, tell what shapes lose."""
    return _shares(job, calibration)[2] if predicts(job) else 0


def least_units(job: Job) -> dict[str, int]:
    """Along which axes candidates are cut, and how few units any of them keeps there, for
    `measuring.measure_dense`; of a shape that is given, FFN neurons, unless a learned mask or the
    refit chooses them.
    """
    from sp3llm.models import families
    from sp3llm.models.shapes import Shape

    settings = job.settings
    if settings.mask == "learned":
        return {}
    dense = Shape.of(job.family, job.dense.config)
    fewest = {
        axis: min(getattr(shape, size) for shape in job.shapes)
        for axis, size in (
            (families.FFN, "intermediate_size"),
            (families.QUERY, "num_key_value_heads"),
            (families.HEAD_DIM, "head_dim"),
        )
        if any(getattr(shape, size) != getattr(dense, size) for shape in job.shapes)
    }
    if any(shape.merges_heads(dense) for shape in job.shapes):
        fewest.pop(families.QUERY, None)  # what heads lose that are merged, trials tell
    if job.family.experts is not None:  # theirs are not cut
        fewest.pop(families.FFN, None)
    if predicts(job):
        return fewest
    keeps_width = all(shape.hidden_size == dense.hidden_size for shape in job.shapes)
    is_measured = settings.refit and settings.unit_selection == "obs" and keeps_width
    return {axis: few for axis, few in fewest.items() if axis == families.FFN and is_measured}


def gaps(job: Job) -> str | None:
    """What stands for layers that go, for `measuring.measure_dense`; None where none may."""
    from sp3llm.models.shapes import Shape

    depth = Shape.of(job.family, job.dense.config).num_hidden_layers
    if all(shape.num_hidden_layers == depth for shape in job.shapes):
        return None
    return "bridged" if job.settings.refit else "cut"


def choose_shape(
    job: Job,
    moments: "Moments",
    tokens: "Tensor",
    journal: "Journal",
    progress: "Progress",
    vocabularies: "Mapping[int, float] | None" = None,
) -> tuple["Shape", "Findings"]:
    """The shape that loses least among those within the budget, and what was found out.

    Trials are refits of the whole model on a few of the calibration windows `tokens`, `(windows,
    tokens)`, scored on others that no fit of the trial saw. `vocabularies` is what fewer tokens
    lose besides, nats a token by rows of the tables; None: none may go. Losses that `journal` has
    from a run before are not found out again.
    """
    from sp3llm.compression.trials import Trial
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.search import Findings, choose, expected, shapes_to_try

    if len(job.shapes) == 1:
        return job.shapes[0], Findings()
    before = journal.latest(_TRIALS)
    kept = [] if before is None else before.facts["trials"]
    trials = {Shape(**sizes): None if rows is None else Trial(**rows) for sizes, rows in kept}
    found = _Search(job, moments, tokens, journal, vocabularies or {}, trials)
    bar = progress.add_task("search for the shape, trials", total=None)
    predicted = _predictions(found)
    while wanted := shapes_to_try(predicted, _losses(found)):
        _try(found, wanted)
        progress.advance(bar, len(wanted))
    losses = _losses(found)
    progress.update(bar, total=len(losses), completed=len(losses))
    return choose(predicted, losses), Findings(expected(predicted, losses), losses)


def _predictions(found: _Search) -> "dict[Shape, Losses]":
    """What every candidate loses, before any scale; the same on every process."""
    job = found.job

    def predict() -> "dict[Shape, Losses]":
        return {
            shape: replace(_of_sizes(found, shape), vocabulary=_of_tokens(found, shape))
            for shape in job.shapes
        }

    predicted = predict()  # by all: a projection is sent from the first to the others
    return job.execution.ranks.from_first(lambda: predicted)


def _of_sizes(found: _Search, shape: "Shape") -> "Losses":
    """What a shape loses by all but fewer tokens."""
    from sp3llm.compression.predicting import predicted_losses, projection_loss
    from sp3llm.planning.search import Losses

    if found.job.is_whole(shape):
        return Losses(0.0, 0.0)
    sizes = _projected_sizes(found, shape)
    if sizes not in found.projected:
        projection = _made(found, shape)  # one for each width is more than a GPU has room for
        found.projected[sizes] = projection_loss(
            found.job.dense, found.job.family, found.moments, projection, found.calibration
        )
    return predicted_losses(found.moments, shape, found.projected[sizes])


def _of_tokens(found: _Search, shape: "Shape") -> float:
    """What a shape loses by fewer tokens."""
    return found.vocabularies.get(shape.vocab_size, 0.0)


def _losses(found: _Search) -> "dict[Shape, float]":
    """Nats a token, by shape that was tried, what fewer tokens lose included."""
    from sp3llm.compression.trials import losses_of
    from sp3llm.text.batches import real_tokens, rows_of

    cut = {shape: trial for shape, trial in found.trials.items() if trial is not None}
    windows, _, unseen_from = _trial_windows(found)
    share = real_tokens(rows_of(windows, slice(0, unseen_from))) / real_tokens(found.calibration)
    losses = dict(zip(cut, losses_of(list(cut.values()), share) if cut else (), strict=True))
    return {shape: losses.get(shape, 0.0) + _of_tokens(found, shape) for shape in found.trials}


def _try(found: _Search, shapes: "Sequence[Shape]") -> None:
    """Find out what shapes lose, side by side, refitted with the tokens that the calibration text
    is in.
    """
    from sp3llm.compression.depth import kept_layers
    from sp3llm.compression.trials import trials_of
    from sp3llm.models.shapes import Shape

    job, (windows, held_from, unseen_from) = found.job, _trial_windows(found)
    rows = Shape.of(job.family, job.dense.config).vocab_size
    found.trials.update(dict.fromkeys(shapes))
    cut = [shape for shape in shapes if not job.is_whole(shape)]
    refitters = []
    for shape in cut:
        projection, layers = _projection(found, shape), kept_layers(found.moments, shape)
        neurons_LF = kept_neurons_of(job, found.moments, shape, projection, in_trials=True)
        of_shape = (replace(shape, vocab_size=rows), projection, layers, neurons_LF)
        refitter = refitter_of(job, *of_shape, held_from, unseen_from)
        refitters.append(replace(refitter, tells_errors=False))
    runs = found.runs if job.execution.keeps_dense else None
    found.trials.update(zip(cut, trials_of(refitters, windows, runs) if cut else (), strict=True))
    kept = [
        [asdict(shape), None if trial is None else asdict(trial)]
        for shape, trial in found.trials.items()
    ]
    found.journal.save(_TRIALS, len(kept), facts={"trials": kept})


def _trial_windows(found: _Search) -> "tuple[Tensor | Examples, int, int]":
    """The text of trials, which of its windows is the first that chooses ridges, and which the
    first that no fit sees: the last windows of all, which neurons are not chosen by either.
    """
    import torch

    from sp3llm.text.batches import first_tokens_of, rows_of

    windows = first_tokens_of(found.calibration, _TRIAL_TOKENS)
    fitted, held, unseen = _shares(found.job, found.calibration)
    first, last = torch.arange(fitted + held), torch.arange(len(windows) - unseen, len(windows))
    return rows_of(windows, torch.cat([first, last])), fitted, fitted + held


def _shares(job: Job, calibration: "Tensor | Examples") -> tuple[int, int, int]:
    """How many of the windows trials are fitted on, how many choose the ridges, and how many tell
    what they lose.
    """
    from sp3llm.models import families
    from sp3llm.text.batches import first_tokens_of, real_tokens

    windows = first_tokens_of(calibration, _TRIAL_TOKENS)
    count, length = len(windows), real_tokens(windows) / len(windows)
    sizes = families.axis_sizes(job.family, job.dense.config)
    widest = max(sizes[families.FFN], sizes[families.QUERY])
    wanted = max(_FEWEST_FITTED, math.ceil(_TOKENS_AN_INPUT * widest / length))
    held, unseen = _HELD_BACK, _UNSEEN
    if job.family.task_head is not None:  # rows are short, and each says one thing
        held, unseen = max(held, wanted // 6), max(unseen, wanted)
    if count >= wanted + held + unseen:
        if job.objective.evaluation_windows is not None:
            little = int(_LITTLE / (sizes[families.RESIDUAL] ** 2 * length))
            wanted = max(wanted, min(little, count // 2))
            held = max(held, min(wanted // 8, count - wanted - unseen))
            unseen = min(max(unseen, little), count - wanted - held)
        return wanted, held, unseen
    unseen = max(1, count // 4)
    held = max(1, (count - unseen) // 6)
    return count - unseen - held, held, unseen


def _projection(found: _Search, shape: "Shape") -> "Projection":
    """The projection of a shape that is tried, made once for all such shapes of its widths."""
    sizes = _projected_sizes(found, shape)
    if sizes not in found.projections:
        found.projections[sizes] = _made(found, shape)
    return found.projections[sizes]


def _made(found: _Search, shape: "Shape") -> "Projection":
    """The projection of a shape, the same on every process."""
    from sp3llm.compression.basis_choice import choose_basis
    from sp3llm.compression.refitter import solves_in

    job = found.job
    basis = choose_basis(
        *(job.dense, job.family, found.moments, shape, found.calibration, job.settings.turn),
        dtype=solves_in(job.execution),
    )
    return same_basis_for_all(job, basis)[1]


def _projected_sizes(found: _Search, shape: "Shape") -> tuple:
    """The sizes of a shape that its projection depends on."""
    sizes = (shape.hidden_size, shape.word_embed_proj_dim, shape.tie_word_embeddings)
    if found.moments.heads:  # the projection cuts heads too
        sizes += (shape.num_key_value_heads, shape.head_dim)
    return sizes
