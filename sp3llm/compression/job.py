"""What a compression is about to do: everything found and checked before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason
from sp3llm.options import CompressConfig

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from sp3llm.compression.projection import Projection
    from sp3llm.compression.refitter import Refitter
    from sp3llm.maths.paired import Excess
    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.models.families import Family
    from sp3llm.models.objectives.schema import Objective
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.limits import Limits, Plan
    from sp3llm.planning.search import Findings
    from sp3llm.runtime.devices import Execution
    from sp3llm.runtime.processes import Ranks
    from sp3llm.text.windows import Windows


# Fewer calibration windows leave a trial of the search nothing to be scored on.
_FEWEST_TRIAL_WINDOWS = 4
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
    findings: "Findings"
    """Of the search for the shape."""
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
    execution: "Execution"
    max_memory: Mapping[str, int]
    """`--max-memory`: bytes by GPU number and `cpu`."""

    @property
    def objective(self) -> "Objective":
        """What the model is for."""
        from sp3llm.models.objectives.catalogue import objective_of

        return objective_of(self.family.architecture)


def prepare(settings: CompressConfig, ranks: "Ranks", device: str, console: "Console") -> Job:
    """Find the model and everything that could be wrong, before any work."""
    from sp3llm.compression.refitter import held_back_from
    from sp3llm.evaluation.harness import check_scoring
    from sp3llm.models import families
    from sp3llm.models.checkpoint import open_model
    from sp3llm.models.objectives.catalogue import objective_of
    from sp3llm.models.source import resolve_model
    from sp3llm.models.stock import empty_model
    from sp3llm.planning.candidates import candidates
    from sp3llm.planning.limits import limits_of, plan_of
    from sp3llm.planning.needs import Workload, needs_of
    from sp3llm.planning.windows import window_length
    from sp3llm.quantization.story import check_before
    from sp3llm.reporting.formatting import human_bytes
    from sp3llm.runtime.devices import arithmetic_of, idle_gpus_line, resolve_execution
    from sp3llm.runtime.folders import check_disk, check_not_input, check_output, held_by_run
    from sp3llm.runtime.memory import memory_limits
    from sp3llm.runtime.placement import free_memory
    from sp3llm.text.sources import local_files

    folder, name, note = resolve_model(settings.model)
    if note:
        console.print(note, markup=False)
    dense, family = open_model(folder)
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
    if settings.moments == "raw" and len(shapes) > 1 and not learned:
        raise UserError(
            "Expected a single shape with --moments raw, which predict nothing, found "
            f"{len(shapes)} to choose from: add --allocate width and --tie keep or untie, or leave "
            "--moments raw out."
        )
    fixed = family.projections is None and any(shape.tie_word_embeddings for shape in shapes)
    if settings.turn != "none" and fixed:
        raise UserError(
            f"Expected --turn none where '{name}' keeps its embeddings tied, which fixes the "
            f"rotation, found {settings.turn}: leave it out, or add --tie untie."
        )

    out = settings.out or Path(f"{Path(name).name.replace(' ', '-')}-keep{100 * settings.keep:g}")
    check_output(out)
    check_not_input(out, folder, "the model that is compressed")
    for text, path in local_files(_text_sets(settings)).items():
        check_not_input(out, path, f"the text '{text}'")
    if settings.refit:
        held_back_from(settings.samples)
    if not learned and len(shapes) > 1 and settings.samples < _FEWEST_TRIAL_WINDOWS:
        raise UserError(
            f"The search for a shape needs at least {_FEWEST_TRIAL_WINDOWS} calibration windows, "
            f"found {settings.samples}: raise --samples, or leave nothing to search for with "
            "--allocate width, --tie keep and, for OPT, --head-dim."
        )
    largest = max(plan_of(family, dense.config, limits, shape).parameters for shape in shapes)
    workload = Workload(
        settings.samples,
        settings.eval_samples,
        window_length(family, dense.config, settings.seq_len),
        dense_dtype.itemsize,
    )
    kept = needs_of(family, dense.config, shapes[0], workload, limits.export_as).kept
    check_disk(out, largest * dtype.itemsize + kept - held_by_run(out))
    max_memory = memory_limits(settings.max_memory)
    arithmetic = arithmetic_of(dense_dtype, dtype)
    execution = resolve_execution(device, arithmetic, ranks, max_memory, settings.compute_dtype)
    # Refuses a config that transformers rejects, before any work.
    empty_model(dense.config, objective_of(family.architecture))
    if learned:
        dense_bytes = families.count_parameters(family, dense.config) * execution.dtype.itemsize
        room = free_memory(execution, max_memory)
        if dense_bytes * _ROOM_TO_LEARN > room:
            raise UserError(
                "Expected room for the whole dense model for --mask learned, "
                f"{human_bytes(dense_bytes * _ROOM_TO_LEARN)} on {execution.device}, found "
                f"{human_bytes(room)}: use --mask closed-form, which streams it."
            )
    if settings.score:
        check_scoring(settings)
    line = idle_gpus_line(execution, "sp3llm.compress")
    if line:
        console.print(line, markup=False, highlight=False)
    if settings.quantize:
        check_before(settings.quantize, execution.device, family, dense.config, shapes, out)
    return Job(
        settings=settings,
        folder=folder,
        name=name,
        dense=dense,
        family=family,
        dense_dtype=dense_dtype,
        dtype=dtype,
        limits=limits,
        shapes=shapes,
        out=out,
        execution=execution,
        max_memory=max_memory,
    )


def run_identity(job: Job) -> dict[str, Any]:
    """Everything that the weights depend on, for a run to be continued by the same one only.

    The first of several processes reads the model's weights for all.
    """
    import json

    from sp3llm.models import checkpoint
    from sp3llm.models.companions import text_files
    from sp3llm.runtime import machine
    from sp3llm.text.sources import local_files

    texts = local_files(_text_sets(job.settings))
    versions = machine.versions()
    model = job.execution.ranks.from_first(lambda: checkpoint.identity(job.dense))
    identity = {
        **job.settings.of_result(),
        **{f"the model's {name}": content for name, content in model.items()},
        **{f"the model's {path.name}": _content(path) for path in text_files(job.folder)},
        **{f"the text of {name}": _content(path) for name, path in texts.items()},
        "the number of processes": job.execution.ranks.count,
        "the kind of device": job.execution.device.type,
        "the arithmetic": str(job.execution.dtype),
        **{
            f"the version of {name}": versions[name] for name in ("sp3llm", "torch", "transformers")
        },
    }
    return json.loads(json.dumps(identity))


def _content(path: Path) -> str:
    """A hash of a file of text.

    Raises UserError if it cannot be read.
    """
    from sp3llm.runtime.files import file_hash

    try:
        return str(file_hash(path))[:16]
    except OSError as error:
        raise UserError(
            f"Cannot read the text '{path}' ({reason(error)}): name a file that can be read."
        ) from error


def _dtype(asked: str, dense: "torch.dtype") -> "torch.dtype":
    import torch

    return dense if asked == "auto" else getattr(torch, asked)


def with_dtype(
    config: Mapping[str, Any], dtype: "torch.dtype", dense: "torch.dtype"
) -> dict[str, Any]:
    """State the dtype under the key the config already uses, where it changes or is missing."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if keys and dtype == dense:
        return dict(config)
    return {**config, **dict.fromkeys(keys or ["torch_dtype"], str(dtype).removeprefix("torch."))}


def hub_id(settings: CompressConfig, name: str) -> str | None:
    """The hub id that the user named; None where it was a folder."""
    is_hub_id = settings.model is not None and not Path(settings.model).exists()
    return name if is_hub_id else None


def calibration_sets(settings: CompressConfig) -> str:
    """The calibration sets, the default resolved."""
    return settings.calib or ("stdlib" if settings.model is None else "wikitext2")


def _text_sets(settings: CompressConfig) -> str:
    """The sets that calibration and evaluation read, each once."""
    from sp3llm.text.sources import default_evaluation, split_names

    calib = calibration_sets(settings)
    evaluation = settings.eval_text or default_evaluation(calib)
    return ",".join(dict.fromkeys([*split_names(calib), *split_names(evaluation)]))


def same_basis_for_all(job: Job, basis: "tuple[Tensor, Projection]") -> "tuple[Tensor, Projection]":
    """The first process's basis, in place: a last bit can turn an eigenvector around."""
    eigenvalues, projection = basis
    job.execution.ranks.broadcast_(eigenvalues, *projection.tensors().values())
    return basis


def refitter_of(
    job: Job, shape: "Shape", projection: "Projection", held_from: int, unseen_from: int
) -> "Refitter":
    """What every fit of the second pass needs, of a job; see `Refitter` for the last two."""
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
