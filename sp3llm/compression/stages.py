"""Stages of a compression that its journal knows: the mask, the basis, the small model's groups."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.compression.job import Job, refitter_of, same_basis_for_all

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.compression.dense_runs import DenseRuns
    from sp3llm.compression.learned_mask import Learned
    from sp3llm.compression.projection import Projection
    from sp3llm.compression.refitter import FinishedGroup, HeadFit
    from sp3llm.compression.statistics import Moments
    from sp3llm.models.served import Export
    from sp3llm.models.shapes import Shape
    from sp3llm.runtime.journal import Journal
    from sp3llm.text.windows import Windows


# What the journal knows the basis and the streams of the refit as.
_BASIS = "basis"
_REFIT = "refit"


def measure(
    job: Job,
    calibration: "Tensor",
    evaluation: "Tensor | None",
    journal: "Journal",
    progress: "Progress | None" = None,
    runs: "DenseRuns | None" = None,
) -> "tuple[Moments, Tensor | None]":
    """All that a job needs to know of its dense model, `measuring.measure_dense` of calibration and
    evaluation windows, token ids, `(windows, tokens)`. What its layers leave of the first goes to
    `runs`, unless that is None.
    """
    from sp3llm.compression.measuring import measure_dense
    from sp3llm.compression.shape_search import gaps, judging_windows, least_units, predicts

    settings = job.settings
    return measure_dense(
        job.dense,
        job.family,
        calibration,
        evaluation,
        settings.moments,
        "pca" if all(map(job.is_whole, job.shapes)) else settings.basis,
        job.execution,
        progress,
        journal,
        least_units(job),
        predicts(job),
        job.original,
        gaps(job),
        runs,
        judging_windows(job, calibration),
    )


def energy_kept(moments: "Moments", projection: "Projection") -> float:
    """Share of the summed second moments' trace that lies inside the basis."""
    total_DD, basis_DK = moments.total(), projection.basis_DK
    return (((total_DD @ basis_DK) * basis_DK).sum() / total_DD.trace()).item()


def whole_spectrum(moments: "Moments") -> "Tensor":
    """Eigenvalues of the summed second moments, falling, float64."""
    import torch

    return torch.linalg.eigvalsh(moments.total()).flip(0)


def learn_mask(
    job: Job, moments: "Moments", mask_windows: "Windows", journal: "Journal", progress: "Progress"
) -> "Learned":
    """Learn on `mask_windows` what is to be kept."""
    from sp3llm.compression.basis_choice import nested_frame
    from sp3llm.compression.learned_mask import learn
    from sp3llm.compression.mask_budget import budget_of
    from sp3llm.compression.mask_steps import MaskTraining

    settings, family = job.settings, job.family
    budget = budget_of(family, job.dense.config, job.limits, job.shapes)
    return learn(
        job.dense,
        family,
        budget,
        partial(nested_frame, family, moments),
        MaskTraining(mask_windows.tokens, settings.mask_batch, settings.mask_steps, settings.seed),
        job.execution,
        progress,
        journal,
    )


def final_basis(
    job: Job,
    shape: "Shape",
    moments: "Moments",
    tokens: "Tensor",
    journal: "Journal",
    mask: "Learned | None" = None,
) -> "tuple[Tensor, Projection]":
    """The global basis as the chosen shape has it; of what a learned mask keeps, if there is one.

    `tokens` are the calibration windows. Returns all eigenvalues of the summed moments, falling,
    and the projection.
    """
    from sp3llm.compression.basis_choice import attention_cut_of, choose_basis, learned_basis
    from sp3llm.compression.projection import Projection
    from sp3llm.compression.refitter import solves_in
    from sp3llm.evaluation.perplexity import LOSSES
    from sp3llm.models.export import SHARD, WEIGHTS

    kept_units = None if mask is None else mask.kept_units()
    before = journal.latest(_BASIS)
    if before is not None and before.facts["shape"] == asdict(shape):
        device = job.execution.device
        matrices = {name: tensor.to(device) for name, tensor in before.tensors.items()}
        eigenvalues = matrices.pop("eigenvalues")
        cut = attention_cut_of(job.dense, job.family, moments, shape)
        return eigenvalues, Projection(**matrices, attention_cut=cut, kept_units=kept_units)
    turn = job.settings.turn
    if mask is None:
        dtype = solves_in(job.execution)
        basis = choose_basis(job.dense, job.family, moments, shape, tokens, turn, dtype)
    else:
        basis = learned_basis(job.dense, job.family, moments, shape, tokens, *mask.stream(), turn)
    eigenvalues, projection = same_basis_for_all(job, basis)
    projection = replace(projection, kept_units=kept_units)
    named = {name: t for name, t in projection.tensors().items() if t is not None}
    journal.drop(WEIGHTS, SHARD, _REFIT, LOSSES)  # of another basis
    journal.save(_BASIS, 0, {**named, "eigenvalues": eigenvalues}, {"shape": asdict(shape)})
    return eigenvalues, projection


def build(
    job: Job,
    shape: "Shape",
    projection: "Projection | None",
    layers: tuple[int, ...] | None,
    neurons_LF: "Tensor | None",
    tokens: "Tensor",
    fitted: int,
    export: "Export",
    model: Path,
    journal: "Journal",
    progress: "Progress",
    runs: "DenseRuns | None" = None,
) -> "tuple[list[dict[str, Any]], HeadFit | None]":
    """Make the small model's groups in order, in the dense model's family, and write them as they
    come, as `export` has them; a log of all fits, and what the head was given by what it says, None
    where nothing was looked for.

    `layers` are those of the dense model that stay, `neurons_LF` what `units.kept_neurons` says.
    Of `tokens` the first `fitted` windows are fitted to, and the others tell how sure the model may
    be. Without a `projection` the groups are the dense ones. `runs` is what `measure` has kept.
    """
    from sp3llm.compression.projecting import plain_groups, whole_groups
    from sp3llm.compression.refitter import FinishedGroup
    from sp3llm.models import families
    from sp3llm.models.export import groups_written, with_zeros, write_model, written_group
    from sp3llm.runtime.progress import tracked

    ranks = job.execution.ranks
    written_as = (export.family, export.config)
    wait = _nothing

    def finished(index: int) -> "Mapping[str, Tensor]":
        wait()  # for the group before, which is being written while the next one is made
        return written_group(*written_as, job.dtype, journal, index)

    count = len(families.groups(*written_as))
    done = ranks.from_first(lambda: groups_written(*written_as, job.dtype, journal))
    refits = job.settings.refit and projection is not None
    if projection is None:
        what, start, fits = "rows that stay", done, []
        groups = whole_groups(job.dense, job.family, job.dtype, done)
    elif refits:
        what = "fold, rotate, cut, refit"
        of_shape = (shape, projection, layers, neurons_LF)
        again = finished if fitted < len(tokens) else None
        start, fits, groups = _refitted(job, *of_shape, tokens, fitted, journal, done, runs, again)
    else:
        what, start, fits = "fold, rotate, cut", done, []
        of_export = (job.dtype, job.execution, done)
        groups = plain_groups(job.dense, job.family, projection, *of_export, layers)
    latest: FinishedGroup | None = None
    zeros = export.zeros()

    def made() -> "Iterator[tuple[int, Mapping[str, Tensor]]]":
        nonlocal latest
        for latest in tracked(progress, what, groups, start, count):
            yield latest.index, with_zeros(latest.tensors, zeros[latest.index], job.dtype)

    if ranks.is_first:
        steps = write_model(*written_as, made(), job.dtype, model, journal)
    else:
        steps = ((index, _nothing) for index, _ in made())
    for index, wait in steps:
        if refits and index + 1 < count and journal.due():
            wait()
            streams = {"dense": latest.dense.hidden, "small": latest.small.hidden}
            journal.save(_REFIT, index + 1, streams, {"fits": fits})
    return fits, None if latest is None else latest.head_fit


def _refitted(
    job: Job,
    shape: "Shape",
    projection: "Projection",
    layers: tuple[int, ...] | None,
    neurons_LF: "Tensor | None",
    tokens: "Tensor",
    fitted: int,
    journal: "Journal",
    done: int,
    runs: "DenseRuns | None",
    finished: "Callable[[int], Mapping[str, Tensor]] | None",
) -> "tuple[int, list[dict[str, Any]], Iterator[FinishedGroup]]":
    """The groups of the refit from where a run before has left both streams, not beyond group
    `done`; with the number of the first, and the log of fits, which grows as groups are made. For
    `finished` see `Refitter`.
    """
    from sp3llm.compression.building import refitted_groups
    from sp3llm.compression.refitter import held_back_from

    before = journal.latest(_REFIT, done)
    start, fits, streams = 0, [], None
    if before is not None:
        start, fits = before.step, list(before.facts["fits"])
        streams = (before.tensors["dense"], before.tensors["small"])
    of_shape = (shape, projection, layers, neurons_LF)
    refitter = refitter_of(job, *of_shape, held_back_from(fitted), fitted)
    refitter = replace(refitter, log=fits, finished=finished)
    groups = refitted_groups(refitter, tokens, start, streams, runs)
    return start, fits, groups


def _nothing() -> None:
    """What a process that writes nothing waits for."""
