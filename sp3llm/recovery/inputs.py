"""What a recovery starts from: both models, checked against each other, and three texts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig
from sp3llm.reporting.record import Record, TunedRecord, read_any_record

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console
    from torch import Tensor

    from sp3llm.evaluation.task_scores import Reported
    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.models.families import Family
    from sp3llm.models.objectives.schema import Objective
    from sp3llm.runtime.processes import Ranks
    from sp3llm.text.examples import Examples
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.windows import Windows
    from sp3llm.vocabulary.same_text import HeldOut


# Settings that change neither the course of training nor what its checkpoints hold.
_FREE = (
    *("model", "teacher", "out", "task", "train", "stop_text", "eval_text", "eval_samples"),
    *("track", "checkpoint_every", "teacher_memory", "device"),
)


@dataclass(frozen=True)
class Pair:
    """The compressed model and its teacher, as they lie on disk."""

    small: "Checkpoint"
    family: "Family"
    name: str
    record: Record | TunedRecord | None
    """`sp3llm.json` of the compressed model; None where it has none."""
    dense: "Checkpoint"
    dense_family: "Family"
    teacher: str
    rows: tuple[int, ...] | None = None
    """By row of the compressed model's tables the teacher's, where it has some of its tokens only;
    None: it has all."""
    spells: bool = False
    """Whether it predicts tokens, and can say how it spells the teacher's other ones."""

    @property
    def compression(self) -> Record | None:
        """The record, where sp3llm compressed the model."""
        return self.record if isinstance(self.record, Record) else None

    @property
    def objective(self) -> "Objective":
        """What both are for."""
        from sp3llm.models.objectives.catalogue import objective_of

        return objective_of(self.family.architecture)


@dataclass(frozen=True)
class Texts:
    """Three sets of windows, or of a task's rows, that share no document."""

    training: "Windows | TaskSet"
    stopping: "Windows | TaskSet"
    held_out: "HeldOut | Reported"
    """What is reported on."""
    note: str = ""
    """What a user is to know of them."""
    stopping_is_fitted: bool = False
    """The model was calibrated on what decides when to stop, so that, before any step, it looks
    better there than it is."""

    def taught(self, objective: "Objective") -> "Tensor | Examples":
        """What the teacher is asked about: training windows or rows, then those for stopping."""
        return objective.join([self.training.tokens, self.stopping.tokens])


@dataclass(frozen=True)
class Run:
    """A recovery that is about to begin: everything found and checked, nothing done."""

    settings: RecoverConfig
    """With `out`."""
    accelerator: "Accelerator"
    ranks: "Ranks"
    """Its processes."""
    pair: Pair
    texts: Texts
    work: Path
    """The folder of checkpoints."""
    micro_batch: int
    """Windows that a process runs at once."""
    model_files: Mapping[str, str]
    """What tells the compressed model from others, by file name (`models.checkpoint.identity`)."""
    teacher_files: Mapping[str, str]
    """The same of its teacher."""


# --------------------------------------------------------------------------- before any work


def open_pair(settings: RecoverConfig, console: "Console") -> Pair:
    """Both models, checked against each other."""
    from sp3llm.models import families
    from sp3llm.models.checkpoint import open_model
    from sp3llm.models.source import resolve_model
    from sp3llm.runtime.folders import RECORD
    from sp3llm.runtime.progress import print_line
    from sp3llm.text.tokenizer import has_backend, load_tokenizer
    from sp3llm.vocabulary.restricting import shared_rows

    folder, name, note = resolve_model(settings.model)
    record = read_any_record(folder)
    if settings.teacher is None and not isinstance(record, Record):
        raise UserError(
            f"Expected --teacher for '{name}', which has no {RECORD} that names the dense "
            "model it came from, found none: name it."
        )
    teacher = settings.teacher or record.settings["model"]
    dense_folder, dense_name, dense_note = resolve_model(teacher)
    if settings.teacher is None:
        dense_note = f"The teacher is {dense_name}, which {name} was made from."
    for line in filter(None, (note, dense_note)):
        print_line(console, line)

    small, family = open_model(folder)
    dense, dense_family = open_model(dense_folder)
    _check_objectives(family.architecture, dense_family.architecture)
    sizes = [
        families.axis_sizes(f, c.config)[families.VOCAB]
        for f, c in ((family, small), (dense_family, dense))
    ]
    tokenizers = [load_tokenizer(folder) for folder in (folder, dense_folder)]
    ids = [tokenizer.get_vocab() for tokenizer in tokenizers]
    pair = Pair(small, family, name, record, dense, dense_family, dense_name)
    if sizes[0] == sizes[1] and ids[0] == ids[1]:
        return pair
    rows = shared_rows(ids[1], ids[0], *sizes)
    if rows is None:
        raise UserError(
            f"Expected a teacher with the vocabulary of '{name}' ({sizes[0]} tokens), or with "
            f"more, found another in '{dense_name}' ({sizes[1]} tokens): name the dense model "
            "that it was made from."
        )
    if pair.objective.labels is not None:  # what it predicts are no tokens
        return replace(pair, rows=rows)
    spells = has_backend(tokenizers[0])
    if not spells:
        print_line(
            console,
            f"The teacher is compared over the tokens of '{name}' alone: how that would spell the "
            "others, only a tokenizer of the tokenizers library can say.",
        )
    return replace(pair, rows=rows, spells=spells)


def _check_objectives(architecture: str, teacher: str) -> None:
    """Raise UserError where the models are not for the same, or for nothing that is learned."""
    from sp3llm.models.objectives.catalogue import objective_of

    objective = objective_of(architecture)
    if objective.labels is None and objective.evaluation_windows is None:
        raise UserError(
            "Expected a model that continues text or has a head for a task, found one of class "
            f"{architecture}, which recovery has nothing to score by: fine-tune it instead."
        )
    if objective_of(teacher) is not objective:
        raise UserError(
            f"Expected a teacher that is for the same as the model of class {architecture}, found "
            f"one of class {teacher}: name the dense model that it was made from."
        )


def disk_bytes(settings: RecoverConfig, pair: Pair) -> int:
    """Bytes of the output, of two checkpoints and of the best weights.

    What is trained is kept in float32: a checkpoint holds the weights and AdamW's two moments.
    """
    from sp3llm.models import families
    from sp3llm.planning.recovery_needs import adapter_parameters

    config = pair.small.config
    parameters = trained = families.count_parameters(pair.family, config)
    if settings.lora is not None:
        trained = adapter_parameters(pair.family, config, settings.lora)
    return parameters * pair.small.dtype().itemsize + (2 * 3 + 1) * 4 * trained


def resolved(settings: RecoverConfig, objective: "Objective") -> RecoverConfig:
    """The settings with the objective's own where nothing was asked for, but for the steps where
    those follow from how many rows there are.

    Raises UserError where they are for something else.
    """
    if objective.labels is None and settings.task is not None:
        raise UserError(
            "Expected an encoder for --task, found a model that continues text, which text is "
            "learned from: leave it out, or name text with --train."
        )
    if objective.labels is not None and settings.of_text is not None:
        raise UserError(
            f"Expected no {settings.of_text} for an encoder, which learns from a task's rows: "
            "leave it out."
        )
    recipe = objective.recipe
    names = ("steps", "temperature", "kl_weight", "hidden_weight", "stop_windows", "patience")
    silent = {name: getattr(recipe, name) for name in names if getattr(settings, name) is None}
    return replace(settings, **silent)


def with_steps(settings: RecoverConfig, objective: "Objective", texts: Texts) -> RecoverConfig:
    """The settings with as many steps as the objective's epochs take, where none were asked for."""
    if settings.steps is not None:
        return settings
    rows = objective.recipe.epochs * len(texts.training.tokens)
    return replace(settings, steps=-(-rows // settings.batch))


def say_texts(settings: RecoverConfig, texts: Texts, unit: str, console: "Console") -> None:
    """Tell how often the training text is gone through, which is in such units, and the note."""
    from sp3llm.runtime.progress import print_line

    windows = len(texts.training.tokens)
    epochs = settings.steps * settings.batch / windows
    padded = texts.training.describe().get("real_tokens") is not None
    print_line(
        console,
        f"{settings.steps} steps of {settings.batch} {unit} of {texts.training.tokens.shape[1]} "
        f"tokens{' at most' * padded}; the text holds {windows} {unit}"
        + (f", gone through {epochs:.1f} times." if epochs > 1 else "."),
    )
    if texts.note:
        print_line(console, texts.note)
    if texts.stopping_is_fitted:
        print_line(
            console,
            "The model was calibrated on the text that decides when to stop, so its loss there "
            "before the first step does not count; --stop-text names other text.",
        )


def identify(
    settings: RecoverConfig, pair: Pair, texts: Texts, ranks: "Ranks"
) -> tuple[dict[str, str], dict[str, str]]:
    """What tells the model and the teacher from others, by file; one process a host reads them.

    Raises UserError where hosts have others, other texts, settings or versions.
    """
    from sp3llm.models import checkpoint
    from sp3llm.options.field import flag
    from sp3llm.runtime import machine

    def look() -> dict[str, Any]:
        chosen = {flag(k): str(v) for k, v in asdict(settings).items() if k not in _FREE}
        versions = machine.versions()
        return {
            **chosen,
            **of_files("model", checkpoint.identity(pair.small)),
            **of_files("teacher", checkpoint.identity(pair.dense)),
            "the training text": texts.training.sha256,
            "the stopping text": texts.stopping.sha256,
            **{f"the version of {name}": versions[name] for name in ("sp3llm", "torch")},
        }

    found = ranks.same_on_hosts(look)

    def files(whose: str) -> dict[str, str]:
        start = f"the {whose}'s "
        return {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}

    return files("model"), files("teacher")


def of_files(whose: str, files: Mapping[str, str]) -> dict[str, str]:
    """What tells a model from others, named so that a reader is told which one differs."""
    return {f"the {whose}'s {name}": content for name, content in files.items()}


def run_identity(run: Run) -> dict[str, Any]:
    """What checkpoints depend on: a run that differs in any of it cannot continue from them."""
    accelerator = run.accelerator
    chosen = {key: value for key, value in asdict(run.settings).items() if key not in _FREE}
    logits = chosen.pop("teacher_logits")
    if logits is None:
        del chosen["top_k"]
    return {
        **chosen,
        "teacher_logits": None if logits is None else str(logits),
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "engine": str(accelerator.distributed_type.value),
        "training_text": run.texts.training.sha256,
        "stopping_text": run.texts.stopping.sha256,
        **of_files("model", run.model_files),
        **of_files("teacher", run.teacher_files),
    }
