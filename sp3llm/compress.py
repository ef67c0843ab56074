"""Compress a decoder model into a smaller one of the same stock architecture.

The story, top-down (SP3, arXiv 2308.16475, carried to LLMs with one basis for the whole stream):

1. find the model, its family and its tokenizer; refuse what cannot be done before any work;
2. list the shapes within the budget;
3. stream the dense model over calibration text, layer by layer, and sum the second moments of the
   normalised residual stream; held-out text goes along for the perplexity before;
4. take one global basis of the stream;
5. choose the shape that loses least, by trial refits on a little of the text;
6. layer by layer beside the dense model: fold the norms, rotate, cut, refit what is left in closed
   form, write it;
7. stream the result over the held-out text for the perplexity after.

`python -m sp3llm.compress [MODEL] --keep 0.75` is the same as `sp3llm compress`.
"""

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.config import CompressConfig
from sp3llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.checkpoint import Checkpoint
    from sp3llm.data import Windows
    from sp3llm.families import Family, Group
    from sp3llm.measure import Moments
    from sp3llm.plan import Plan, Shape
    from sp3llm.project import Projection
    from sp3llm.rebuild import Refitter
    from sp3llm.score import Excess
    from sp3llm.stream import Execution

# A trial refit of the search sees this many windows, this long at most; a quarter of them are
# kept from every fit and tell how much the shape loses.
_TRIAL_WINDOWS = 24
_TRIAL_TOKENS = 512
_FEWEST_TRIAL_WINDOWS = 4


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
    dense: "Checkpoint"
    family: "Family"
    dtype: "torch.dtype"
    """Of the weights written."""
    on: "Execution"
    calibration: "Tensor"
    """Token ids, `(windows, tokens)`."""


def compress(settings: CompressConfig, console: "Console") -> Result:
    """Run the whole pipeline; the output folder holds the compressed model when it returns.

    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    import torch

    from sp3llm import card, families, page, report, samples, score, source
    from sp3llm import checkpoint as disk
    from sp3llm.measure import measure_dense, measure_losses
    from sp3llm.plan import candidates, limits_of, plan_of, resized_config
    from sp3llm.rebuild import held_back_from
    from sp3llm.record import RECORD
    from sp3llm.stream import empty_model, execution

    started = time.monotonic()
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
    if not settings.refit:
        shapes = shapes[:1]  # there are no trials to choose by

    out = settings.out or Path(f"{Path(name).name.replace(' ', '-')}-keep{100 * settings.keep:g}")
    disk.check_output(out)
    if settings.refit:
        held_back_from(settings.samples)
    if len(shapes) > 1 and settings.samples < _FEWEST_TRIAL_WINDOWS:
        raise UserError(
            f"The search for a shape needs at least {_FEWEST_TRIAL_WINDOWS} calibration windows, "
            f"found {settings.samples}: raise --samples, or leave nothing to search for with "
            "--allocate width, --tie keep and, for OPT, --head-dim."
        )
    largest = max(plan_of(family, dense.config, limits, shape).parameters for shape in shapes)
    disk.check_disk(out, largest * dtype.itemsize)
    on = execution(settings.device, torch.promote_types(dense_dtype, dtype))
    empty_model(dense.config)  # refuses a config that transformers rejects, before any work
    calibration, evaluation = _windows(settings, dense, family)
    job = Job(settings, dense, family, dtype, on, calibration.tokens)

    with disk.output_folder(out) as partial, report.progress_bars(console) as progress:
        moments, dense_losses = measure_dense(
            dense,
            family,
            calibration.tokens,
            evaluation.tokens,
            settings.moments,
            settings.basis,
            on,
            progress,
        )
        shape, trials = choose_shape(job, shapes, moments, progress)
        plan = plan_of(family, dense.config, limits, shape)
        progress.console.print(report.plan_line(name, plan), highlight=False, markup=False)
        small_config = resized_config(family, dense.config, shape)
        small_config = _with_dtype(small_config, dtype, dense_dtype)
        eigenvalues, energy, fits, compressed = compressed_groups(job, shape, moments, progress)
        small = write_model(family, small_config, compressed, dtype, partial)
        losses = measure_losses(small, family, evaluation.tokens, on, progress)
        companions = disk.copy_companions(folder, partial)
        result = Result(
            name=name,
            out=out,
            architecture=family.architecture,
            command=_command(settings),
            plan=plan,
            trials=trials,
            fits=fits,
            eigenvalues=eigenvalues,
            energy_kept=energy,
            dense_bytes=plan.dense_parameters * dense_dtype.itemsize,
            weight_bytes=plan.parameters * dtype.itemsize,
            calibration=calibration,
            evaluation=evaluation,
            dense_perplexity=score.perplexity(dense_losses),
            perplexity=score.perplexity(losses),
            excess=score.excess_log_perplexity(losses, dense_losses),
            seconds=time.monotonic() - started,
            peak_memory=report.peak_memory(),
            device_memory=report.device_memory(str(on.device)),
        )
        record = _record(result, settings, on, dtype, companions)
        record["parameters"] = {
            "dense": families.count_parts(family, dense.config),
            "small": families.count_parts(family, small_config),
        }
        disk.write_json(partial / RECORD, record)
        card.write_card(partial, record, folder)
        disk.write_json(partial / "config.json", small_config)

    console.print(report.closing_table(record))
    if settings.report:
        record, why = samples.with_samples(
            out, record, console, settings.device, dense=folder, tokens=evaluation.tokens
        )
        page.write_page(out, record, why)
    console.print(report.next_steps(result), highlight=False, markup=False)
    return result


def choose_shape(
    job: Job, shapes: list["Shape"], moments: "Moments", progress: "Progress"
) -> tuple["Shape", list[dict[str, Any]]]:
    """The shape that loses least among those within the budget, and what was tried.

    Each trial is a refit of the whole model on a few calibration windows, scored on others that
    no fit of the trial saw.
    """
    from sp3llm.measure import choose_basis
    from sp3llm.plan import row_of, search
    from sp3llm.rebuild import trial_loss

    if len(shapes) == 1:
        return shapes[0], []
    tokens = job.calibration[:_TRIAL_WINDOWS, :_TRIAL_TOKENS]
    unseen_from = len(tokens) - max(1, len(tokens) // 4)
    held_from = unseen_from - max(1, unseen_from // 6)
    bar = progress.add_task("search for the shape", total=None)

    projections: dict[tuple, Projection] = {}

    def loss_of(shape: "Shape") -> float:
        widths = (shape.hidden_size, shape.word_embed_proj_dim, shape.tie_word_embeddings)
        if moments.heads:  # the projection cuts heads too
            widths += (shape.num_key_value_heads, shape.head_dim)
        if widths not in projections:
            _, projections[widths] = choose_basis(
                job.dense, job.family, moments, shape, job.calibration
            )
        refitter = _refitter(job, shape, projections[widths], held_from, unseen_from)
        loss = trial_loss(refitter, tokens)
        progress.advance(bar)
        return loss

    losses: dict[Shape, float] = {}
    for tied in (True, False):
        alike = [shape for shape in shapes if shape.tie_word_embeddings == tied]
        if alike:
            row = partial(row_of, job.family, job.dense.config)
            losses |= search(alike, loss_of, row)[1]
    best = min(losses, key=losses.__getitem__)
    progress.update(bar, total=len(losses))
    return best, [{**asdict(shape), "trial_loss": loss} for shape, loss in losses.items()]


def compressed_groups(
    job: Job, shape: "Shape", moments: "Moments", progress: "Progress"
) -> "tuple[Tensor, float, list[dict[str, Any]], Iterator[tuple[Group, dict[str, Tensor]]]]":
    """All eigenvalues, the energy kept, a log that fills as fits are made, and the compressed
    groups in order.
    """
    from sp3llm import families
    from sp3llm.measure import choose_basis, tracked
    from sp3llm.rebuild import held_back_from, plain_groups, refitted_groups

    eigenvalues, projection = choose_basis(job.dense, job.family, moments, shape, job.calibration)
    total_DD, basis_DK = moments.total(), projection.basis_DK
    energy = ((total_DD @ basis_DK) * basis_DK).sum() / total_DD.trace()
    groups = families.groups(job.family, job.dense.config)
    if not job.settings.refit:
        bar = tracked(progress, "fold, rotate, cut", groups)
        plain = plain_groups(job.dense, job.family, projection, job.dtype, job.on, bar)
        return eigenvalues, energy.item(), [], plain
    windows = len(job.calibration)
    refitter = _refitter(job, shape, projection, held_back_from(windows), windows)
    bar = tracked(progress, "fold, rotate, cut, refit", groups)
    return eigenvalues, energy.item(), refitter.log, refitted_groups(refitter, job.calibration, bar)


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


def write_model(
    family: "Family",
    small_config: Mapping[str, Any],
    compressed: "Iterable[tuple[Group, dict[str, Tensor]]]",
    dtype: "torch.dtype",
    folder: Path,
) -> "Checkpoint":
    """Write groups as they come, a shard at a time; returns the checkpoint written.

    `config.json` is not written yet: the folder does not load until the caller says it is whole.
    """
    from sp3llm import checkpoint as disk
    from sp3llm.families import count_parameters

    layout = disk.shard_layout(family, small_config, dtype)
    ends = {shard[-1].name: number for number, shard in enumerate(layout)}
    files: dict[str, Path] = {}
    pending: dict[str, Tensor] = {}
    for group, tensors in compressed:
        pending |= {name: tensor.cpu() for name, tensor in tensors.items()}
        if group.name in ends:
            path = disk.write_shard(folder, ends[group.name], len(layout), pending)
            files |= dict.fromkeys(pending, path)
            pending = {}
    parameters = count_parameters(family, small_config)
    disk.write_index(folder, layout, parameters * dtype.itemsize, parameters)
    return disk.Checkpoint(folder, small_config, files)


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


def _windows(
    settings: CompressConfig, dense: "Checkpoint", family: "Family"
) -> "tuple[Windows, Windows]":
    """Calibration and evaluation windows of the length the model can take."""
    from sp3llm import data, families

    seq_len = families.window_length(family, dense.config, settings.seq_len)
    tokenizer = data.load_tokenizer(dense.folder)
    calib = settings.calib or ("stdlib" if settings.model is None else "wikitext2")
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


def _record(
    result: Result,
    settings: CompressConfig,
    on: "Execution",
    dtype: "torch.dtype",
    companions: list[str],
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
        "files_copied": companions,
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
        if key == "model" or (key != "keep" and value == defaults[key]):
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
