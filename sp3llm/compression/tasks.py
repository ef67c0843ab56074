"""The rows of an encoder's task: some to calibrate on, and how both models answer the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sp3llm.compression.figures import stock_model
from sp3llm.compression.job import Job
from sp3llm.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from sp3llm.evaluation.task_scores import Reported
    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.reporting.record import TaskFigure
    from sp3llm.text.labels import Labels
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.tasks import Task


@dataclass(frozen=True)
class TaskRows:
    """What a compression reads of a task."""

    calibration: "TaskSet"
    held_out: "Reported | TaskSet"
    """The validation rows, as they are answered, or where nothing answers as texts."""


def task_of(job: Job) -> "tuple[Task, Labels]":
    """The task of a job, and what its model predicts of it."""
    from sp3llm.text.tasks import task_for

    labels = job.objective.labels(job.dense.config)
    return task_for(job.settings.task or "", labels.kind), labels


def read_rows(job: Job) -> TaskRows:
    """Training rows to calibrate on, and the validation rows.

    Raises UserError if a row is not as the task says, there are too few, or the tokenizer has ids
    that the model has not.
    """
    from sp3llm.compression.sentences import read_texts_of_rows
    from sp3llm.evaluation.task_scores import reported
    from sp3llm.text.task_sets import drawn

    if job.objective.labels is None:
        rows = TaskRows(*read_texts_of_rows(job))
        _check(job, rows)
        return rows
    task, labels = task_of(job)
    tokenizer, seq_len = _read_by(job, task)
    held_out = reported(task, labels, tokenizer, seq_len)
    settings, known = job.settings, held_out.documents
    calibration = drawn(task, tokenizer, settings.calibrated, seq_len, settings.seed, known)
    rows = TaskRows(calibration, held_out)
    _check(job, rows)
    return rows


def read_mask_rows(job: Job, held_out: "Reported | TaskSet") -> "TaskSet":
    """What a mask learns on: training rows, none of which is among `held_out`."""
    from sp3llm.compression.sentences import read_texts_to_learn_from
    from sp3llm.compression.texts import check_ids

    settings = job.settings
    samples = settings.mask_steps * settings.mask_batch
    if job.objective.labels is None:
        rows = read_texts_to_learn_from(job, held_out.documents, samples)
    else:
        task, _ = task_of(job)
        tokenizer, seq_len = _read_by(job, task)
        draw = job.objective.training_windows
        rows = draw(task, tokenizer, samples, seq_len, settings.seed, held_out.documents)
    check_ids(job, rows.tokens)
    return rows


def _read_by(job: Job, task: "Task") -> tuple[Any, int]:
    """The tokenizer that reads a task's rows, and the tokens a row has at most."""
    from sp3llm.evaluation.task_scores import row_length
    from sp3llm.text.tokenizer import load_row_tokenizer

    tokenizer = load_row_tokenizer(job.dense.folder)
    return tokenizer, row_length(task, job.dense.config, tokenizer, job.settings.seq_len)


def _check(job: Job, rows: TaskRows) -> None:
    """Raise UserError where rows are too few for what is made of them, or not for the model."""
    from sp3llm.compression.shape_search import FEWEST_WINDOWS
    from sp3llm.compression.texts import check_ids

    found, least = len(rows.calibration.tokens), 1
    if job.settings.refit:  # which holds some back
        least = 2 if len(job.shapes) == 1 else FEWEST_WINDOWS
    if found < least:
        raise UserError(
            f"Expected at least {least} training rows to calibrate on in '{job.settings.task}', "
            f"found {found}: give the task more rows."
        )
    check_ids(job, rows.calibration.tokens, rows.held_out.tokens)


def task_answers(
    job: Job, rows: TaskRows, small: "Checkpoint", progress: "Progress"
) -> "tuple[TaskFigure, ...]":
    """How the small model and the dense one answer the validation rows, in float32; where nothing
    answers, how their cosines agree.
    """
    from sp3llm.compression.sentences import cosine_figures
    from sp3llm.evaluation.task_scores import score_rows
    from sp3llm.reporting.record import TaskFigure

    if job.objective.labels is None:
        return cosine_figures(job, rows.held_out, small, progress)
    asked = rows.held_out
    answers = [
        _answers(job, checkpoint, asked, progress, what)
        for checkpoint, what in ((small, "compressed model"), (job.dense, "dense model"))
    ]
    return tuple(
        TaskFigure(
            task=row.task,
            metric=row.metric,
            samples=row.samples,
            dense=row.dense,
            small=row.small,
            paired_standard_error=row.paired_standard_error,
        )
        for row in score_rows(asked, *answers)
    )


def _answers(
    job: Job, checkpoint: "Checkpoint", asked: "Reported", progress: "Progress", what: str
) -> dict[str, Sequence[Any]]:
    """By split what a model answers."""
    from sp3llm.evaluation.score_task import BATCH

    model = stock_model(job, checkpoint)
    return asked.answered_by(model, what, job.objective, BATCH, progress)
