"""Choose a shape: by trial refits of a few candidates on a little of the calibration text."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sp3llm.compression.job import Job, refitter_of, same_basis_for_all

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.compression.projection import Projection
    from sp3llm.compression.statistics import Moments
    from sp3llm.models.shapes import Shape
    from sp3llm.runtime.journal import Journal

# A trial sees this many windows, this long at most.
_TRIAL_WINDOWS = 24
_TRIAL_TOKENS = 512
# Of them one in so many is kept from every fit and tells how much the shape loses, and of the
# others one in so many chooses the ridges.
_UNSEEN_SHARE, _HELD_BACK_SHARE = 4, 6
# What the journal knows the losses of trials as.
_TRIALS = "trials"


@dataclass(frozen=True)
class _Trials:
    """Trial refits, and what they found out so far."""

    job: Job
    moments: "Moments"
    calibration: "Tensor"
    """All calibration windows, `(windows, tokens)`, which bases are made from."""
    windows: "Tensor"
    """Those that trials see, `(windows, tokens)`."""
    held_from: int
    """First of them that is held back to choose ridges."""
    unseen_from: int
    """First of them that no fit sees."""
    journal: "Journal"
    losses: "dict[Shape, float]"
    """Nats a token, by shape; those of an earlier run among them."""
    projections: "dict[tuple, Projection]" = field(default_factory=dict)
    """By all sizes that a projection depends on: shapes that differ in the FFN share one."""


def choose_shape(
    job: Job, moments: "Moments", tokens: "Tensor", journal: "Journal", progress: "Progress"
) -> tuple["Shape", list[dict[str, Any]]]:
    """The shape that loses least among those within the budget, and what was tried.

    Each trial is a refit of the whole model on a few of the calibration windows `tokens`,
    `(windows, tokens)`, scored on others that no fit of the trial saw. Tied and untied shapes are
    searched by themselves. Losses that `journal` has from a run before are not found out again.
    """
    from sp3llm.planning.search import row_of, search

    if len(job.shapes) == 1:
        return job.shapes[0], []
    trials = _begin(job, moments, tokens, journal)
    bar = progress.add_task("search for the shape", total=None)

    def loss_of(shape: "Shape") -> float:
        loss = _loss(trials, shape)
        progress.advance(bar)
        return loss

    losses: dict[Shape, float] = {}
    row = partial(row_of, job.family, job.dense.config)
    for tied in (True, False):
        alike = [shape for shape in job.shapes if shape.tie_word_embeddings == tied]
        if alike:
            losses |= search(alike, loss_of, row)[1]
    best = min(losses, key=losses.__getitem__)
    progress.update(bar, total=len(losses))
    return best, [{**asdict(shape), "trial_loss": loss} for shape, loss in losses.items()]


def _begin(job: Job, moments: "Moments", tokens: "Tensor", journal: "Journal") -> _Trials:
    """No trials yet, but for those of a run before."""
    from sp3llm.models.shapes import Shape

    windows = tokens[:_TRIAL_WINDOWS, :_TRIAL_TOKENS]
    unseen_from = len(windows) - max(1, len(windows) // _UNSEEN_SHARE)
    held_from = unseen_from - max(1, unseen_from // _HELD_BACK_SHARE)
    before = journal.latest(_TRIALS)
    tried = [] if before is None else before.facts["losses"]
    losses = {Shape(**sizes): loss for sizes, loss in tried}
    return _Trials(job, moments, tokens, windows, held_from, unseen_from, journal, losses)


def _loss(trials: _Trials, shape: "Shape") -> float:
    """What a shape loses, nats a token; found out once."""
    from sp3llm.compression.building import trial_loss

    if shape not in trials.losses:
        projection = _projection(trials, shape)
        refitter = refitter_of(trials.job, shape, projection, trials.held_from, trials.unseen_from)
        trials.losses[shape] = trial_loss(refitter, trials.windows)
        losses = [[asdict(tried), loss] for tried, loss in trials.losses.items()]
        trials.journal.save(_TRIALS, len(losses), facts={"losses": losses})
    return trials.losses[shape]


def _projection(trials: _Trials, shape: "Shape") -> "Projection":
    """The projection of a shape, made once for all shapes of its widths."""
    from sp3llm.compression.basis_choice import choose_basis

    job, moments = trials.job, trials.moments
    sizes = (shape.hidden_size, shape.word_embed_proj_dim, shape.tie_word_embeddings)
    if moments.heads:  # the projection cuts heads too
        sizes += (shape.num_key_value_heads, shape.head_dim)
    if sizes not in trials.projections:
        basis = choose_basis(
            job.dense, job.family, moments, shape, trials.calibration, job.settings.turn
        )
        trials.projections[sizes] = same_basis_for_all(job, basis)[1]
    return trials.projections[sizes]
