"""The stages of a compression: shape, mask, basis, and the groups of the small model."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.compression.job import Job

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.compression.learned_mask import Learned
    from sp3llm.compression.projection import Projection
    from sp3llm.compression.refitter import Refitter
    from sp3llm.compression.statistics import Moments
    from sp3llm.models.shapes import Shape
    from sp3llm.runtime.journal import Journal
    from sp3llm.text.windows import Windows


# A trial refit of the search sees this many windows, this long at most; a quarter of them are
# kept from every fit and tell how much the shape loses.
_TRIAL_WINDOWS = 24
_TRIAL_TOKENS = 512
_TRIALS = "trials"
_BASIS = "basis"
_REFIT = "refit"


def energy_kept(moments: "Moments", projection: "Projection") -> float:
    """Share of the summed second moments' trace that lies inside the basis."""
    total_DD, basis_DK = moments.total(), projection.basis_DK
    return (((total_DD @ basis_DK) * basis_DK).sum() / total_DD.trace()).item()


def choose_shape(
    job: Job, moments: "Moments", tokens: "Tensor", journal: "Journal", progress: "Progress"
) -> tuple["Shape", list[dict[str, Any]]]:
    """The shape that loses least among those within the budget, and what was tried.

    Each trial is a refit of the whole model on a few calibration windows, scored on others that
    no fit of the trial saw.
    """
    from sp3llm.compression.basis_choice import choose_basis
    from sp3llm.compression.building import trial_loss
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.search import row_of, search

    shapes = job.shapes
    if len(shapes) == 1:
        return shapes[0], []
    few = tokens[:_TRIAL_WINDOWS, :_TRIAL_TOKENS]
    unseen_from = len(few) - max(1, len(few) // 4)
    held_from = unseen_from - max(1, unseen_from // 6)
    bar = progress.add_task("search for the shape", total=None)

    before = journal.latest(_TRIALS)
    tried = [] if before is None else before.facts["losses"]
    known = {Shape(**sizes): loss for sizes, loss in tried}
    projections: dict[tuple, Projection] = {}

    def loss_of(shape: "Shape") -> float:
        if shape not in known:
            widths = (shape.hidden_size, shape.word_embed_proj_dim, shape.tie_word_embeddings)
            if moments.heads:  # the projection cuts heads too
                widths += (shape.num_key_value_heads, shape.head_dim)
            if widths not in projections:
                turn = job.settings.turn
                found = choose_basis(job.dense, job.family, moments, shape, tokens, turn)
                projections[widths] = _same_for_all(job, found)[1]
            refitter = _refitter(job, shape, projections[widths], held_from, unseen_from)
            known[shape] = trial_loss(refitter, few)
            losses = [[asdict(shape), loss] for shape, loss in known.items()]
            journal.save(_TRIALS, len(losses), facts={"losses": losses})
        progress.advance(bar)
        return known[shape]

    losses: dict[Shape, float] = {}
    for tied in (True, False):
        alike = [shape for shape in shapes if shape.tie_word_embeddings == tied]
        if alike:
            row = partial(row_of, job.family, job.dense.config)
            losses |= search(alike, loss_of, row)[1]
    best = min(losses, key=losses.__getitem__)
    progress.update(bar, total=len(losses))
    return best, [{**asdict(shape), "trial_loss": loss} for shape, loss in losses.items()]


def learn_mask(
    job: Job, moments: "Moments", lessons: "Windows", journal: "Journal", progress: "Progress"
) -> "tuple[Learned, dict[str, Any]]":
    """What gates on the dense model find is to be kept, and what the record says of it."""
    from sp3llm.compression.basis_choice import nested_frame
    from sp3llm.compression.learned_mask import Lessons, learn
    from sp3llm.compression.mask_budget import budget_of

    settings, family = job.settings, job.family
    found = budget_of(family, job.dense.config, job.limits, job.shapes)
    mask = learn(
        job.dense,
        family,
        found,
        partial(nested_frame, family, moments),
        Lessons(lessons.tokens, settings.mask_batch, settings.mask_steps, settings.seed),
        job.execution,
        progress,
        journal,
    )
    return mask, {"mask": {**mask.describe(), "training": lessons.describe()}}


def final_basis(
    job: Job,
    shape: "Shape",
    moments: "Moments",
    tokens: "Tensor",
    journal: "Journal",
    mask: "Learned | None" = None,
) -> "tuple[Tensor, Projection]":
    """All eigenvalues, and the projection of the chosen shape; what a learned mask keeps, if there
    is one.
    """
    from sp3llm.compression.basis_choice import attention_cut_of, choose_basis, learned_basis
    from sp3llm.compression.projection import Projection
    from sp3llm.evaluation.perplexity import LOSSES
    from sp3llm.models.export import SHARD, WEIGHTS

    kept_units = None if mask is None else mask.kept_units()
    before = journal.latest(_BASIS)
    if before is not None and before.facts["shape"] == asdict(shape):
        found = {name: tensor.to(job.execution.device) for name, tensor in before.tensors.items()}
        eigenvalues = found.pop("eigenvalues")
        attention_cut = attention_cut_of(job.dense, job.family, moments, shape)
        return eigenvalues, Projection(**found, attention_cut=attention_cut, kept_units=kept_units)
    turn = job.settings.turn
    if mask is None:
        found = choose_basis(job.dense, job.family, moments, shape, tokens, turn)
    else:
        found = learned_basis(job.dense, job.family, moments, shape, tokens, *mask.stream(), turn)
    eigenvalues, projection = _same_for_all(job, found)
    projection = replace(projection, kept_units=kept_units)
    named = {name: t for name, t in projection.tensors().items() if t is not None}
    journal.drop(WEIGHTS, SHARD, _REFIT, LOSSES)  # of another basis
    journal.save(_BASIS, 0, {**named, "eigenvalues": eigenvalues}, {"shape": asdict(shape)})
    return eigenvalues, projection


def _same_for_all(job: Job, found: "tuple[Tensor, Projection]") -> "tuple[Tensor, Projection]":
    """The first process's basis: a last bit more or less can turn an eigenvector around."""
    eigenvalues, projection = found
    job.execution.ranks.broadcast_(eigenvalues, *projection.tensors().values())
    return found


def build(
    job: Job,
    shape: "Shape",
    projection: "Projection",
    tokens: "Tensor",
    small_config: Mapping[str, Any],
    model: Path,
    journal: "Journal",
    progress: "Progress",
) -> list[dict[str, Any]]:
    """Make the small model's groups in order, and write them as they come; a log of all fits."""
    from sp3llm.compression.building import refitted_groups
    from sp3llm.compression.projecting import plain_groups
    from sp3llm.compression.refitter import FinishedGroup, held_back_from
    from sp3llm.models import families
    from sp3llm.models.export import groups_written, write_model
    from sp3llm.runtime.progress import tracked

    ranks, windows = job.execution.ranks, len(tokens)
    count = len(families.groups(job.family, job.dense.config))
    done = ranks.from_first(lambda: groups_written(job.family, small_config, job.dtype, journal))
    if not job.settings.refit:
        what, fits = "fold, rotate, cut", []
        groups = plain_groups(job.dense, job.family, projection, job.dtype, job.execution, done)
        start = done
    else:
        what = "fold, rotate, cut, refit"
        before = journal.latest(_REFIT, done)
        start = 0 if before is None else before.step
        fits = [] if before is None else list(before.facts["fits"])
        saved = None if before is None else (before.tensors["dense"], before.tensors["small"])
        held_from = held_back_from(windows)
        refitter = replace(_refitter(job, shape, projection, held_from, windows), log=fits)
        groups = refitted_groups(refitter, tokens, start, saved)
    latest: FinishedGroup | None = None

    def made() -> "Iterator[tuple[int, Mapping[str, Tensor]]]":
        nonlocal latest
        for latest in tracked(progress, what, groups, start, count):
            yield latest.index, latest.tensors

    if ranks.is_first:
        steps = write_model(job.family, small_config, made(), job.dtype, model, journal)
    else:
        steps = ((index, _nothing) for index, _ in made())
    for index, wait in steps:
        if job.settings.refit and index + 1 < count and journal.due():
            wait()
            streams = {"dense": latest.dense.hidden, "small": latest.small.hidden}
            journal.save(_REFIT, index + 1, streams, {"fits": fits})
    return fits


def _nothing() -> None:
    """What a process that writes nothing waits for."""


def _refitter(
    job: Job, shape: "Shape", projection: "Projection", held_from: int, unseen_from: int
) -> "Refitter":
    from sp3llm.compression.refitter import Refitter

    return Refitter(
        dense=job.dense,
        family=job.family,
        shape=shape,
        projection=projection,
        dtype=job.dtype,
        execution=job.execution,
        unit_selection=job.settings.unit_selection,
        held_from=held_from,
        unseen_from=unseen_from,
        log=[],
    )
