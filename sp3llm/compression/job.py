"""What a compression is about to do, and what it produces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason
from sp3llm.options import CompressConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sp3llm.compression.projection import Projection
    from sp3llm.compression.refitter import HeadFit, Refitter
    from sp3llm.compression.statistics import Moments
    from sp3llm.evaluation.task_scores import Reported
    from sp3llm.maths.paired import Excess
    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.models.families import Family
    from sp3llm.models.objectives.schema import Objective
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.limits import Limits, Plan
    from sp3llm.planning.search import Findings
    from sp3llm.reporting.record import TaskFigure
    from sp3llm.runtime.devices import Execution
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.windows import Windows
    from sp3llm.vocabulary.choosing import ChosenVocabulary
    from sp3llm.vocabulary.same_text import HeldOut


@dataclass(frozen=True)
class Figures:
    """Of the dense model and the compressed one."""

    dense_perplexity: float | None = None
    perplexity: float | None = None
    """Of a dense token, where the vocabulary was cut."""
    excess: "Excess | None" = None
    answers: "tuple[TaskFigure, ...] | None" = None
    """On a task, in place of the perplexities."""


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
    layers: tuple[int, ...]
    """Of the dense model, those that stay; none: all do."""
    fits: list[dict[str, Any]]
    head_fit: "HeadFit | None"
    """What the head was given by what it says; None: nothing was looked for."""
    eigenvalues: "Tensor"
    energy_kept: float
    """Share of the energy of the dense stream, as its second moments have it, inside the basis."""
    dense_bytes: int
    weight_bytes: int
    calibration: "Windows | TaskSet"
    held_out: "HeldOut | Reported"
    dense_perplexity: float | None
    perplexity: float | None
    excess: "Excess | None"
    answers: "tuple[TaskFigure, ...] | None"
    """These four as `Figures` has them."""
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
    """With the vocabulary that stays: what everything is measured on and made from."""
    original: "Checkpoint"
    """As it lies on disk: what the budget and the losses are about."""
    vocabularies: "Sequence[ChosenVocabulary]"
    """What may stay of it, the most first; none: all stays."""
    vocabulary: "ChosenVocabulary | None"
    """Which of them `dense` has."""
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

    def is_whole(self, shape: "Shape") -> bool:
        """Whether a shape has all that the dense one has, but for the vocabulary."""
        from sp3llm.models.shapes import Shape

        dense = Shape.of(self.family, self.dense.config)
        return self.vocabulary is not None and replace(shape, vocab_size=dense.vocab_size) == dense

    def with_vocabulary_of(self, shape: "Shape") -> "Job":
        """The job with the vocabulary that a shape has."""
        rows = shape.vocab_size
        chosen = next((one for one in self.vocabularies if one.kept.rows == rows), None)
        return self if chosen is self.vocabulary else self.with_vocabulary(chosen)

    def with_vocabulary(self, vocabulary: "ChosenVocabulary") -> "Job":
        """The job with that one of its vocabularies."""
        from sp3llm.vocabulary.restricting import restricted_checkpoint

        dense = restricted_checkpoint(self.original, self.family, vocabulary.kept)
        return replace(self, dense=dense, vocabulary=vocabulary)

    @property
    def objective(self) -> "Objective":
        """What the model is for."""
        from sp3llm.models.objectives.catalogue import objective_of

        return objective_of(self.family.architecture)


def run_identity(job: Job) -> dict[str, Any]:
    """Everything that the weights depend on, for a run to be continued by the same one only.

    The first process of every host reads the model's weights there, and the first of all the text.

    Raises UserError, naming what differs, where hosts have different settings, models or versions.
    """
    import json

    ranks = job.execution.ranks
    of_hosts = ranks.same_on_hosts(lambda: _of_host(job))
    texts = ranks.from_first(
        lambda: {
            f"the text of {name}": _content(path)
            for name, path in files_named(job.settings).items()
        }
    )
    return json.loads(json.dumps({**of_hosts, **texts, "the number of processes": ranks.count}))


def files_named(settings: CompressConfig) -> dict[str, Path]:
    """The local files that text, or a task's rows, are read from, by what they are called.

    Raises UserError if there is no such task.
    """
    from sp3llm.text.sources import local_files
    from sp3llm.text.tasks import resolve_task

    if settings.task is None:
        return local_files(text_sets(settings))
    return resolve_task(settings.task).files


def _of_host(job: Job) -> dict[str, Any]:
    """What has to be the same on every host."""
    from sp3llm.models import checkpoint
    from sp3llm.models.companions import text_files
    from sp3llm.runtime import machine

    versions = machine.versions()
    return {
        **job.settings.of_result(),
        **{f"the model's {name}": hash for name, hash in checkpoint.identity(job.dense).items()},
        **{f"the model's {path.name}": _content(path) for path in text_files(job.folder)},
        "the kind of device": job.execution.device.type,
        "the arithmetic": str(job.execution.dtype),
        **{
            f"the version of {name}": versions[name] for name in ("sp3llm", "torch", "transformers")
        },
    }


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


def evaluation_sets(settings: CompressConfig) -> str:
    """The held-out sets, the default resolved."""
    from sp3llm.text.sources import default_evaluation

    return settings.eval_text or default_evaluation(calibration_sets(settings))


def text_sets(settings: CompressConfig) -> str:
    """The sets that are read, each once."""
    from sp3llm.text.sources import split_names

    lists = (calibration_sets(settings), evaluation_sets(settings), settings.vocab_from)
    names = [name for names in lists if names is not None for name in split_names(names)]
    return ",".join(dict.fromkeys(names))


def same_basis_for_all(job: Job, basis: "tuple[Tensor, Projection]") -> "tuple[Tensor, Projection]":
    """The first process's basis, in place: a last bit can turn an eigenvector around."""
    eigenvalues, projection = basis
    job.execution.ranks.broadcast_(eigenvalues, *projection.tensors().values())
    return basis


def kept_neurons_of(
    job: Job,
    moments: "Moments",
    shape: "Shape",
    projection: "Projection | None",
    in_trials: bool = False,
) -> "Tensor | None":
    """Which FFN neurons of the dense model stay in a shape, `(L, neurons)`, boolean; None: all, or
    the refit chooses, as it does where the stream gets narrower: what neurons say is then something
    else (eval/NOTES.md). For `in_trials` see `units.kept_neurons`.
    """
    from sp3llm.compression.units import kept_neurons
    from sp3llm.models.shapes import Shape

    chooses = job.settings.unit_selection != "obs"
    if chooses or projection is None or not projection.keeps_channels:
        return None
    neurons = Shape.of(job.family, job.dense.config).intermediate_size
    return kept_neurons(moments, neurons, shape.intermediate_size, in_trials)


def refitter_of(
    job: Job,
    shape: "Shape",
    projection: "Projection",
    layers: tuple[int, ...] | None,
    neurons_LF: "Tensor | None",
    held_from: int,
    unseen_from: int,
) -> "Refitter":
    """What every fit of the second pass needs, of a job; see `Refitter` for the last four."""
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
        layers=layers,
        neurons_LF=neurons_LF,
    )
