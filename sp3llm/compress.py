"""Compress a decoder model into a smaller one of the same stock architecture.

The story, top-down (SP3, arXiv 2308.16475, carried to LLMs with one basis for the whole stream):

1. find the model, its family and its tokenizer; refuse what cannot be done before any work;
2. list the shapes within the budget;
3. stream the dense model over calibration text, layer by layer, and sum the second moments of the
   normalised residual stream; held-out text goes along for the perplexity before;
4. take one global basis of the stream;
5. choose the shape that loses least, by trial refits on a little of the text; or with `--mask
   learned` let gates learn what to keep, and the shape with it;
6. layer by layer beside the dense model: fold the norms, rotate, cut, refit what is left in closed
   form, write it;
7. stream the result over the held-out text for the perplexity after;
8. with `--recover-steps`, tune it against the dense model; with `--score`, score both on tasks of
   lm-eval; with `--quantize`, write it in few bits too.

`python -m sp3llm.compress [MODEL] --keep 0.75` is the same as `sp3llm compress`.
"""

import contextlib
import gc
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.config import CompressConfig, QuantizeConfig, RecoverConfig
from sp3llm.errors import ResumableError, UserError, reason
from sp3llm.record import RECORD, read_record

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.checkpoint import Checkpoint
    from sp3llm.data import Windows
    from sp3llm.execution import Execution, Ranks
    from sp3llm.families import Family
    from sp3llm.learn import Learned
    from sp3llm.measure import Moments
    from sp3llm.plan import Limits, Plan, Shape
    from sp3llm.project import Projection
    from sp3llm.rebuild import Refitter
    from sp3llm.resume import Journal
    from sp3llm.score import Excess

# A trial refit of the search sees this many windows, this long at most; a quarter of them are
# kept from every fit and tell how much the shape loses.
_TRIAL_WINDOWS = 24
_TRIAL_TOKENS = 512
_FEWEST_TRIAL_WINDOWS = 4

# Stages, as the journal of a run knows them; the streaming passes have names of their own.
_BATCH, _TEXT, _TRIALS, _BASIS, _REFIT, _FINISHED = (
    "batch", "text", "trials", "basis", "refit", "finished",
)  # fmt: skip
# A mask is learned on the whole model, its activations apart: it and its largest table twice.
_ROOM_TO_LEARN = 1.25


@dataclass(frozen=True)
class Result:
    """What a run produced."""

    name: str
    out: Path
    architecture: str
    command: str
    plan: "Plan"
    trials: list[dict[str, Any]]
    fits: list[dict[str, Any]]
    eigenvalues: "Tensor"
    energy_kept: float
    """Share of the energy of the dense stream, as its second moments have it, inside the basis."""
    dense_bytes: int
    weight_bytes: int
    calibration: "Windows"
    evaluation: "Windows"
    dense_perplexity: float
    perplexity: float
    excess: "Excess"
    seconds: float
    peak_memory: int
    device_memory: int


@dataclass(frozen=True)
class Job:
    """The dense model, what it is to become, and where that is computed."""

    settings: CompressConfig
    folder: Path
    """Of the dense model."""
    name: str
    """To show."""
    dense: "Checkpoint"
    family: "Family"
    dense_dtype: "torch.dtype"
    dtype: "torch.dtype"
    """Of the weights written."""
    limits: "Limits"
    shapes: "list[Shape]"
    """Within the budget."""
    out: Path
    on: "Execution"


def compress(settings: CompressConfig, console: "Console") -> Result | None:
    """Run the whole pipeline; the output folder holds the compressed model when it returns.

    What a killed run of the same settings has finished is not done again; None where that was the
    compression itself. Under `accelerate launch` every process calls this, and the first one
    writes.

    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    from sp3llm import card, execution, harness, report

    ranks, device = execution.joined(settings.device)
    job = None

    def look() -> None:
        nonlocal job
        job = _prepared(settings, ranks, device, console)

    ranks.from_first(look)  # it may download; the others then find everything there
    job = job or _prepared(settings, ranks, device, console)
    out = Path(os.path.abspath(job.out))  # where `.` is when it has been replaced
    result = None
    if ranks.from_first(lambda: _is_being_recovered(job)):
        console.print(f"'{job.out}' is compressed; going on with its recovery.", markup=False)
        tokens = ranks.from_first(lambda: _read_windows(job))[1].tokens
    else:
        result, record, job = _compressed(job, console)
        tokens = result.evaluation.tokens
        console.print(report.closing_table(record))
        if ranks.is_first:
            _write_page(job, out, tokens, record, console)
        console.print(report.next_steps(result, settings.report), highlight=False, markup=False)
        ranks.from_first(lambda: None)  # the result has its final name when the others go on
    if settings.recover_steps:
        _recover(job, ranks.from_first(lambda: read_record(out)), console)
    if settings.score:
        harness.score_compressed(settings, out, console)
    if (settings.recover_steps or settings.score) and ranks.is_first:
        record = read_record(out)
        card.write_card(out, record, job.folder)
        _write_page(job, out, tokens, record, console)
    if settings.quantize and ranks.is_first:
        _quantize(settings, out, console)
    return result


def _is_being_recovered(job: Job) -> bool:
    """Whether this very command has compressed the model before and was killed in its recovery."""
    from sp3llm.training import work_folder

    if not job.settings.recover_steps or job.settings.fresh or not work_folder(job.out).is_dir():
        return False
    record = read_record(job.out) if (job.out / RECORD).is_file() else {}
    return record.get("command") == _command(job.settings) and "recoveries" not in record


def _compressed(job: Job, console: "Console") -> tuple[Result, dict[str, Any], Job]:
    """All stages, as often as memory asks for; with the record, and the job as it ran at last."""
    import torch

    from sp3llm import checkpoint as disk
    from sp3llm import report
    from sp3llm.resume import open_journal

    started, settings, ranks = time.monotonic(), job.settings, job.on.ranks
    with disk.run_folder(job.out, settings.fresh, ranks) as folder:
        journal = open_journal(
            folder / f"state-{ranks.index}",
            _identity(job),
            ranks,
            lambda line: console.print(line, highlight=False, markup=False),
        )
        model = folder / disk.MODEL
        _take_back(journal, job.out, model)
        job = replace(job, on=_placed(job, journal, folder, settings))
        result = None
        with report.progress_bars(console) as progress:
            while result is None:
                with contextlib.suppress(torch.OutOfMemoryError):
                    result, record = _run(job, journal, model, started, progress)
                if result is None:  # what the attempt held goes with its frames
                    gc.collect()
                    torch.cuda.empty_cache()
                    job = replace(job, on=_halved(job, journal))
        journal.save(_FINISHED, 0)
        ranks.gathered(None)  # the first process clears up when all have come here
    return result, record, job


def _write_page(
    job: Job, out: Path, tokens: "Tensor", record: dict[str, Any], console: "Console"
) -> None:
    """Write report.html into the result, with samples where memory holds the dense model."""
    from sp3llm import page, samples

    if job.settings.report:
        record, why = samples.with_samples(
            out,
            record,
            console,
            str(job.on.device),
            dense=job.folder,
            tokens=tokens,
        )
        page.write_page(out, record, why)


def _recover(job: Job, record: Mapping[str, Any], console: "Console") -> None:
    """Tune the result; what is tuned takes its place when it is whole."""
    from sp3llm.recover import recover
    from sp3llm.source import bundled_model

    settings = job.settings
    recovery = RecoverConfig(
        model=str(job.out),
        teacher=settings.model or str(bundled_model()),
        out=job.out,
        train=",".join(record["calibration"]["sources"]),
        eval_text=",".join(record["evaluation"]["sources"]),
        eval_samples=settings.eval_samples,
        steps=settings.recover_steps,
        seq_len=settings.seq_len,
        device=settings.device,
        seed=settings.seed,
    )
    with _standing(job.out, "its recovery did not begin or end", "recover"):
        recover(recovery, console)


def _quantize(settings: CompressConfig, out: Path, console: "Console") -> None:
    """Write the result in few bits too, beside itself."""
    from sp3llm.quantize import quantize

    quantization = QuantizeConfig(str(out), settings.quantize or "", device=settings.device)
    with _standing(out, "was not quantized", "quantize"):
        quantize(quantization, console)


@contextlib.contextmanager
def _standing(out: Path, failed: str, command: str) -> Iterator[None]:
    """What goes wrong after the compression takes nothing from its result, and says so."""
    import torch

    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"The compressed model in '{out}' stands, but {failed} (mend it and use `sp3llm "
            f"{command}`): {reason(error, 600)}."
        ) from error


def _prepared(settings: CompressConfig, ranks: "Ranks", device: str, console: "Console") -> Job:
    """Find the model and everything that could be wrong, before any work."""
    import torch

    from sp3llm import checkpoint as disk
    from sp3llm import execution, families, harness, quantize, report, source
    from sp3llm.plan import candidates, limits_of, plan_of
    from sp3llm.rebuild import held_back_from
    from sp3llm.stream import empty_model

    folder, name, note = source.resolve_model(settings.model)
    if note:
        console.print(note, markup=False)
    family = families.family_of(source.read_config(folder))
    dense = disk.with_prefix(disk.open_checkpoint(folder), family)
    disk.check_tensors(dense, family)
    dense_dtype = dense.dtype()
    dtype = _dtype(settings.dtype, dense_dtype)
    limits = limits_of(settings, dtype.itemsize)
    shapes = candidates(family, dense.config, limits)
    if settings.moments == "raw" and families.is_square(family, dense.config):
        raise UserError(
            f"Expected --moments normalised for a {family.model_type} model, whose heads are cut "
            "by what they read, found raw: leave it out."
        )
    learned = settings.mask == "learned"
    if not settings.refit and not learned:
        shapes = shapes[:1]  # there are no trials to choose by
    fixed = family.projections is None and any(shape.tie_word_embeddings for shape in shapes)
    if settings.turn != "none" and fixed:
        raise UserError(
            f"Expected --turn none where '{name}' keeps its embeddings tied, which fixes the "
            f"rotation, found {settings.turn}: leave it out, or add --tie untie."
        )

    out = settings.out or Path(f"{Path(name).name.replace(' ', '-')}-keep{100 * settings.keep:g}")
    disk.check_output(out)
    if settings.refit:
        held_back_from(settings.samples)
    if not learned and len(shapes) > 1 and settings.samples < _FEWEST_TRIAL_WINDOWS:
        raise UserError(
            f"The search for a shape needs at least {_FEWEST_TRIAL_WINDOWS} calibration windows, "
            f"found {settings.samples}: raise --samples, or leave nothing to search for with "
            "--allocate width, --tie keep and, for OPT, --head-dim."
        )
    largest = max(plan_of(family, dense.config, limits, shape).parameters for shape in shapes)
    disk.check_disk(out, largest * dtype.itemsize - disk.held_by_run(out))
    memory = execution.memory_limits(settings.max_memory)
    on = execution.execution(device, torch.promote_types(dense_dtype, dtype), ranks, memory)
    empty_model(dense.config)  # refuses a config that transformers rejects, before any work
    if learned:
        dense_bytes = families.count_parameters(family, dense.config) * on.dtype.itemsize
        room = execution.free_memory(on, memory)
        if dense_bytes * _ROOM_TO_LEARN > room:
            raise UserError(
                "Expected room for the whole dense model for --mask learned, "
                f"{report.human_bytes(dense_bytes * _ROOM_TO_LEARN)} on {on.device}, found "
                f"{report.human_bytes(room)}: use --mask closed-form, which streams it."
            )
    if settings.score:
        harness.check_scoring(settings)
    if settings.quantize:
        quantize.check_before(settings.quantize, on.device, family, dense.config, shapes, out)
    return Job(settings, folder, name, dense, family, dense_dtype, dtype, limits, shapes, out, on)


def _identity(job: Job) -> dict[str, Any]:
    """Everything that the weights depend on, for a run to be continued by the same one only."""
    import json

    from sp3llm import checkpoint as disk
    from sp3llm import report

    texts = f"{job.settings.calib or ''},{job.settings.eval_text or ''}".split(",")
    versions = report.versions()
    identity = {
        **job.settings.of_result(),
        **{f"the model's {name}": found for name, found in disk.fingerprint(job.dense).items()},
        **{f"the text of {name}": _content(Path(name)) for name in texts if Path(name).is_file()},
        "the number of processes": job.on.ranks.count,
        "the kind of device": job.on.device.type,
        **{
            f"the version of {name}": versions[name] for name in ("sp3llm", "torch", "transformers")
        },
    }
    return json.loads(json.dumps(identity))


def _content(path: Path) -> str:
    """A hash of a file of text.

    Raises UserError if it cannot be read.
    """
    from sp3llm.resume import file_hash

    try:
        return str(file_hash(path))[:16]
    except OSError as error:
        raise UserError(
            f"Cannot read the text '{path}' ({reason(error)}): name a file that can be read."
        ) from error


def _take_back(journal: "Journal", out: Path, model: Path) -> None:
    """A run killed between giving its result the final name and clearing up has that to do again:
    its result goes back to where the run finds it.
    """
    finished = journal.latest(_FINISHED) is not None  # all processes ask together
    if not (journal.ranks.is_first and finished):
        return
    if not any(model.iterdir()) and (out / RECORD).is_file():
        model.rmdir()
        out.rename(model)


def _placed(job: Job, journal: "Journal", folder: Path, settings: CompressConfig) -> "Execution":
    """Where streams lie and how much goes through a layer at once; what a run before has found
    out about the latter holds, since sums depend on it in their last bits.
    """
    from sp3llm import execution, families
    from sp3llm.plan import needs_of

    seq_len = families.window_length(job.family, job.dense.config, settings.seq_len)
    needs = needs_of(
        job.family,
        job.dense.config,
        job.shapes[0],
        settings.samples,
        settings.eval_samples,
        seq_len,
        job.dense_dtype.itemsize,
        job.on.dtype.itemsize,
    )
    before = journal.latest(_BATCH)
    found = {} if before is None else before.facts
    known = [n for n in (settings.batch_tokens, found.get("tokens")) if n is not None]
    on = execution.placed(
        job.on,
        settings.streams,
        needs.streams,
        needs.working,
        needs.token,
        (min(known, default=None), found.get("share")),
        folder / "scratch",
        execution.memory_limits(settings.max_memory),
    )
    journal.save(_BATCH, 0, facts={"tokens": on.batch_tokens, "share": on.share_tokens})
    return on


def _halved(job: Job, journal: "Journal") -> "Execution":
    """Half the tokens at once, after the GPU has run out of memory.

    Raises ResumableError where the run cannot go on by itself.
    """
    from sp3llm import families

    seq_len = families.window_length(job.family, job.dense.config, job.settings.seq_len)
    windows = min(job.on.windows_a_batch(seq_len), job.settings.samples)
    fewer = max(1, windows // 2)
    journal.save(_BATCH, 0, facts={"tokens": fewer * seq_len, "share": job.on.share_tokens})
    if windows == 1:
        raise ResumableError(
            "The GPU ran out of memory with a single window: give the same command again with "
            "--streams host or disk, or close what else uses the GPU."
        )
    if job.on.ranks.count > 1:
        raise ResumableError(
            f"The GPU ran out of memory with {windows} windows at once: give the same command "
            f"again, which goes on with {fewer}."
        )
    journal.say(f"The GPU ran out of memory; going on with {fewer} windows at once, not {windows}.")
    return replace(job.on, batch_tokens=fewer * seq_len)


def _run(
    job: Job, journal: "Journal", model: Path, started: float, progress: "Progress"
) -> tuple[Result, dict[str, Any]]:
    """All stages, and their record; what `journal` has of one is not done again. `model` holds
    everything then.
    """
    from sp3llm import card, execution, families, report, score
    from sp3llm import checkpoint as disk
    from sp3llm.basis import write_basis
    from sp3llm.measure import measure_dense, measure_losses
    from sp3llm.plan import plan_of, resized_config

    settings, dense, family, on = job.settings, job.dense, job.family, job.on
    calibration, evaluation = _windows(job, journal)
    lessons = None
    if settings.mask == "learned":  # read now: what is wrong with a text is said before any work
        lessons = on.ranks.from_first(lambda: _read_lessons(job, evaluation))
    moments, dense_losses = measure_dense(
        dense,
        family,
        calibration.tokens,
        evaluation.tokens,
        settings.moments,
        settings.basis,
        on,
        progress,
        journal,
    )
    if lessons is not None:
        mask, about_mask = learn_mask(job, moments, lessons, journal, progress)
        shape, trials = mask.shape, []
    else:
        mask, about_mask = None, {}
        shape, trials = choose_shape(job, moments, calibration.tokens, journal, progress)
    plan = plan_of(family, dense.config, job.limits, shape)
    progress.console.print(report.plan_line(job.name, plan), highlight=False, markup=False)
    small_config = resized_config(family, dense.config, shape)
    small_config = _with_dtype(small_config, job.dtype, job.dense_dtype)
    eigenvalues, projection = final_basis(job, shape, moments, calibration.tokens, journal, mask)
    energy = _energy_kept(moments, projection)
    del moments  # at large widths several matrices that nothing needs any more
    execution.give_back()
    fits = build(job, shape, projection, calibration.tokens, small_config, model, journal, progress)
    small = on.ranks.from_first(lambda: disk.written(family, small_config, job.dtype, model))
    losses = measure_losses(small, family, evaluation.tokens, on, progress, journal)
    result = Result(
        name=job.name,
        out=job.out,
        architecture=family.architecture,
        command=_command(settings),
        plan=plan,
        trials=trials,
        fits=fits,
        eigenvalues=eigenvalues,
        energy_kept=energy,
        dense_bytes=plan.dense_parameters * job.dense_dtype.itemsize,
        weight_bytes=plan.parameters * job.dtype.itemsize,
        calibration=calibration,
        evaluation=evaluation,
        dense_perplexity=score.perplexity(dense_losses),
        perplexity=score.perplexity(losses),
        excess=score.excess_log_perplexity(losses, dense_losses),
        seconds=time.monotonic() - started,
        peak_memory=report.peak_memory(),
        device_memory=report.device_memory(str(on.device)),
    )
    record = {
        **_record(result, settings, on, job.dtype),
        **about_mask,
        "parameters": {
            "dense": families.count_parts(family, dense.config),
            "small": families.count_parts(family, small_config),
        },
    }
    if on.ranks.is_first:
        record["files_copied"] = disk.copy_companions(job.folder, model)
        disk.write_json(model / RECORD, record)
        card.write_card(model, record, job.folder)
        write_basis(model, projection.writes())
        disk.write_json(model / "config.json", small_config)
    return result, record


def _energy_kept(moments: "Moments", projection: "Projection") -> float:
    total_DD, basis_DK = moments.total(), projection.basis_DK
    return (((total_DD @ basis_DK) * basis_DK).sum() / total_DD.trace()).item()


def choose_shape(
    job: Job, moments: "Moments", tokens: "Tensor", journal: "Journal", progress: "Progress"
) -> tuple["Shape", list[dict[str, Any]]]:
    """The shape that loses least among those within the budget, and what was tried.

    Each trial is a refit of the whole model on a few calibration windows, scored on others that
    no fit of the trial saw.
    """
    from sp3llm.measure import choose_basis
    from sp3llm.plan import Shape, row_of, search
    from sp3llm.rebuild import trial_loss

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
    from sp3llm import budget, learn, measure

    settings, family = job.settings, job.family
    found = budget.budget_of(family, job.dense.config, job.limits, job.shapes)
    mask = learn.learn(
        job.dense,
        family,
        found,
        partial(measure.nested_frame, family, moments),
        learn.Lessons(lessons.tokens, settings.mask_batch, settings.mask_steps, settings.seed),
        job.on,
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
    from sp3llm import checkpoint as disk
    from sp3llm.measure import LOSSES, choose_basis, learned_basis, narrowing_of
    from sp3llm.project import Projection

    winners = None if mask is None else mask.winners()
    before = journal.latest(_BASIS)
    if before is not None and before.facts["shape"] == asdict(shape):
        found = {name: tensor.to(job.on.device) for name, tensor in before.tensors.items()}
        eigenvalues = found.pop("eigenvalues")
        narrowing = narrowing_of(job.dense, job.family, moments, shape)
        return eigenvalues, Projection(**found, narrowing=narrowing, winners=winners)
    turn = job.settings.turn
    if mask is None:
        found = choose_basis(job.dense, job.family, moments, shape, tokens, turn)
    else:
        found = learned_basis(job.dense, job.family, moments, shape, tokens, *mask.stream(), turn)
    eigenvalues, projection = _same_for_all(job, found)
    projection = replace(projection, winners=winners)
    named = {name: t for name, t in projection.tensors().items() if t is not None}
    journal.drop(disk.WEIGHTS, disk.SHARD, _REFIT, LOSSES)  # of another basis
    journal.save(_BASIS, 0, {**named, "eigenvalues": eigenvalues}, {"shape": asdict(shape)})
    return eigenvalues, projection


def _same_for_all(job: Job, found: "tuple[Tensor, Projection]") -> "tuple[Tensor, Projection]":
    """The first process's basis: a last bit more or less can turn an eigenvector around."""
    eigenvalues, projection = found
    job.on.ranks.copy_(eigenvalues, *projection.tensors().values())
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
    from sp3llm import checkpoint as disk
    from sp3llm import families
    from sp3llm.measure import tracked
    from sp3llm.rebuild import Built, held_back_from, plain_groups, refitted_groups

    ranks, windows = job.on.ranks, len(tokens)
    count = len(families.groups(job.family, job.dense.config))
    done = ranks.from_first(
        lambda: disk.groups_written(job.family, small_config, job.dtype, journal)
    )
    if not job.settings.refit:
        what, fits = "fold, rotate, cut", []
        groups = plain_groups(job.dense, job.family, projection, job.dtype, job.on, done)
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
    latest: Built | None = None

    def made() -> "Iterator[tuple[int, Mapping[str, Tensor]]]":
        nonlocal latest
        for latest in tracked(progress, what, groups, start, count):
            yield latest.index, latest.tensors

    if ranks.is_first:
        steps = disk.write_model(job.family, small_config, made(), job.dtype, model, journal)
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
    from sp3llm.rebuild import Refitter

    return Refitter(
        dense=job.dense,
        family=job.family,
        shape=shape,
        projection=projection,
        dtype=job.dtype,
        on=job.on,
        choose=job.settings.choose,
        held_from=held_from,
        unseen_from=unseen_from,
        log=[],
    )


def _dtype(asked: str, dense: "torch.dtype") -> "torch.dtype":
    import torch

    return dense if asked == "auto" else getattr(torch, asked)


def _with_dtype(
    config: Mapping[str, Any], dtype: "torch.dtype", dense: "torch.dtype"
) -> dict[str, Any]:
    """State the dtype under the key the config already uses, where it changes or is missing."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if keys and dtype == dense:
        return dict(config)
    return {**config, **dict.fromkeys(keys or ["torch_dtype"], str(dtype).removeprefix("torch."))}


def _hub_id(settings: CompressConfig, name: str) -> str | None:
    is_hub_id = settings.model is not None and not Path(settings.model).exists()
    return name if is_hub_id else None


def _windows(job: Job, journal: "Journal") -> "tuple[Windows, Windows]":
    """Calibration and evaluation windows of the length the model can take; the first process
    reads the text.
    """
    from sp3llm.data import Windows

    before = journal.latest(_TEXT)
    if before is None:
        both = job.on.ranks.from_first(lambda: _read_windows(job))
        facts = [
            {**vars(windows), "tokens": None, "documents": sorted(windows.documents)}
            for windows in both
        ]
        tensors = {str(i): windows.tokens for i, windows in enumerate(both)}
        journal.save(_TEXT, 0, tensors, {"windows": facts})
        return both
    calibration, evaluation = (
        Windows(
            **{
                **facts,
                "tokens": before.tensors[str(i)],
                "sources": tuple(facts["sources"]),
                "documents": frozenset(facts["documents"]),
            }
        )
        for i, facts in enumerate(before.facts["windows"])
    )
    return calibration, evaluation


def _calibration_sets(settings: CompressConfig) -> str:
    return settings.calib or ("stdlib" if settings.model is None else "wikitext2")


def _read_windows(job: Job) -> "tuple[Windows, Windows]":
    from sp3llm import data, families

    settings, dense, family = job.settings, job.dense, job.family
    seq_len = families.window_length(family, dense.config, settings.seq_len)
    tokenizer = data.load_tokenizer(dense.folder)
    calib = _calibration_sets(settings)
    calibration = data.calibration_windows(
        calib, tokenizer, settings.samples, seq_len, settings.seed
    )
    evaluation = data.evaluation_windows(
        settings.eval_text or data.default_evaluation(calib),
        tokenizer,
        settings.eval_samples,
        seq_len,
        calibration.documents,
    )
    vocab_size = families.axis_sizes(family, dense.config)[families.VOCAB]
    largest = max(calibration.tokens.max().item(), evaluation.tokens.max().item())
    if largest >= vocab_size:
        raise UserError(
            f"Expected token ids below the model's vocab_size {vocab_size}, found {largest}: the "
            f"tokenizer in '{dense.folder}' belongs to another model."
        )
    return calibration, evaluation


def _read_lessons(job: Job, evaluation: "Windows") -> "Windows":
    """What a mask learns on: the training part of the calibration sets."""
    from sp3llm import data, families

    settings = job.settings
    return data.training_windows(
        _calibration_sets(settings),
        data.load_tokenizer(job.dense.folder),
        settings.mask_steps * settings.mask_batch,
        families.window_length(job.family, job.dense.config, settings.seq_len),
        settings.seed,
        evaluation.documents,
    )


def _record(
    result: Result,
    settings: CompressConfig,
    on: "Execution",
    dtype: "torch.dtype",
) -> dict[str, Any]:
    """`sp3llm.json`: everything needed to know, and repeat, what was done."""
    from sp3llm import report

    resolved = replace(
        settings,
        out=str(result.out),
        calib=",".join(result.calibration.sources),
        eval_text=",".join(result.evaluation.sources),
        seq_len=result.calibration.tokens.shape[1],
        allocate=settings.allocation,
        multiple_of=result.plan.multiple_of,
        device=str(on.device),
        dtype=str(dtype).removeprefix("torch."),
    )
    return {
        "model": result.name,
        "base_model": _hub_id(settings, result.name),
        "architecture": result.architecture,
        "command": result.command,
        "settings": asdict(resolved),
        "plan": result.plan.describe(),
        "calibration": result.calibration.describe(),
        "evaluation": result.evaluation.describe(),
        "dense_perplexity": result.dense_perplexity,
        "perplexity": result.perplexity,
        "excess_log_perplexity": result.excess.describe(),
        "trials": result.trials,
        "fits": result.fits,
        "eigenvalues": result.eigenvalues.tolist(),
        "energy_kept": result.energy_kept,
        "dtype": str(dtype).removeprefix("torch."),
        "compute_dtype": str(on.dtype).removeprefix("torch."),
        "dense_weight_bytes": result.dense_bytes,
        "weight_bytes": result.weight_bytes,
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_memory,
        "device_memory_bytes": result.device_memory,
        "versions": report.versions(),
        "machine": report.machine(str(on.device)),
    }


def _command(settings: CompressConfig) -> str:
    """The command line that gives these settings."""
    defaults = asdict(CompressConfig())
    words = ["sp3llm", "compress", *([settings.model] if settings.model else [])]
    for key, value in asdict(settings).items():
        if key in ("model", "fresh") or (key != "keep" and value == defaults[key]):
            continue
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    from sp3llm.cli import main

    main(prefix=["compress"])
