"""What an encoder's recovery learns from and is judged by: a task's rows, and how it answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig
from sp3llm.recovery.figures import Figures
from sp3llm.recovery.inputs import Pair, Texts
from sp3llm.reporting.record import RecoveredFigure

if TYPE_CHECKING:
    from rich.progress import Progress

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.text.labels import Labels
    from sp3llm.text.tasks import Task

# More rows than any task has: all of them.
_ALL_ROWS = 2**40


def _task(settings: RecoverConfig, pair: Pair) -> "tuple[Task, Labels]":
    """The task, as asked or the compression's own, and what both models predict of it."""
    from sp3llm.text.tasks import task_for

    compression = pair.compression
    words = settings.task or (compression and compression.settings.get("task"))
    if not words:
        raise UserError(
            f"Expected --task for '{pair.name}', the task that the dense model was fine-tuned on, "
            "found none: name it, as --task sst2."
        )
    labels, theirs = (pair.objective.labels(c.config) for c in (pair.small, pair.dense))
    if labels != theirs:
        raise UserError(
            f"Expected a teacher that predicts what '{pair.name}' does "
            f"({', '.join(labels.names)}), found one that predicts {', '.join(theirs.names)} in "
            f"'{pair.teacher}': name the dense model that it was made from."
        )
    return task_for(words, labels.kind), labels


def row_length_of(settings: RecoverConfig, pair: Pair) -> int:
    """Tokens a row at most: as asked, or what is usual and both models have positions for."""
    from sp3llm.evaluation.task_scores import row_length
    from sp3llm.text.tokenizer import load_row_tokenizer

    task, _ = _task(settings, pair)
    return min(
        row_length(task, model.config, load_row_tokenizer(model.folder), settings.seq_len)
        for model in (pair.small, pair.dense)
    )


def task_files(settings: RecoverConfig, pair: Pair) -> dict[str, Path]:
    """The files that rows are read from."""
    return _task(settings, pair)[0].files


def draw_rows(settings: RecoverConfig, pair: Pair) -> Texts:
    """Training rows, those of them that decide when to stop, and the validation rows."""
    from sp3llm.evaluation.task_scores import reported
    from sp3llm.models import families
    from sp3llm.text.tokenizer import load_row_tokenizer
    from sp3llm.text.windows import check_token_ids

    task, labels = _task(settings, pair)
    tokenizer = load_row_tokenizer(pair.small.folder)
    seq_len = row_length_of(settings, pair)
    held_out = reported(task, labels, tokenizer, seq_len)
    learned = labels if settings.lm_weight else None
    draw = pair.objective.training_windows
    samples = settings.steps * settings.batch if settings.steps else _ALL_ROWS
    shared = (held_out.documents, False, learned)
    training = draw(task, tokenizer, samples, seq_len, settings.seed, *shared)
    known = held_out.documents | training.documents
    stopping = draw(task, tokenizer, settings.stop_windows, seq_len, 0, known, True, learned)
    vocab_size = families.axis_sizes(pair.family, pair.small.config)[families.VOCAB]
    batches = (training.tokens, stopping.tokens, held_out.tokens)
    check_token_ids(batches, vocab_size, pair.small.folder)
    return Texts(training, stopping, held_out)


def measure_rows(
    pair: Pair, written: "Checkpoint", texts: Texts, device: str, progress: "Progress"
) -> Figures:
    """How the recovered model, the one before and the dense one answer the validation rows."""
    from sp3llm.evaluation.task_scores import reported, score_rows
    from sp3llm.text.tokenizer import load_row_tokenizer

    small = texts.held_out
    dense = small
    if pair.rows is not None:
        tokenizer = load_row_tokenizer(pair.dense.folder)
        dense = reported(small.task, small.labels, tokenizer, small.seq_len)
    answers = [
        _answers(pair, checkpoint, asked, device, progress, name)
        for checkpoint, asked, name in (
            (written, small, "recovered model"),
            (pair.small, small, "model before"),
            (pair.dense, dense, "dense model"),
        )
    ]
    after, before = (score_rows(small, one, answers[-1]) for one in answers[:-1])
    return Figures(
        scores=tuple(
            RecoveredFigure(
                task=row.task,
                metric=row.metric,
                samples=row.samples,
                dense=row.dense,
                before=earlier.small,
                small=row.small,
                paired_standard_error_before=earlier.paired_standard_error,
                paired_standard_error=row.paired_standard_error,
            )
            for row, earlier in zip(after, before, strict=True)
        )
    )


def _answers(
    pair: Pair, checkpoint: "Checkpoint", asked: Any, device: str, progress: "Progress", name: str
) -> dict[str, Any]:
    """By split what a model answers, in float32."""
    from transformers import AutoConfig

    from sp3llm.evaluation.score_task import BATCH
    from sp3llm.evaluation.task_scores import load_model

    # What was just written has no config yet.
    config = AutoConfig.from_pretrained(
        (pair.dense if checkpoint is pair.dense else pair.small).folder
    )
    place = (pair.objective, torch.device(device), "float32", config)
    model = load_model(checkpoint.folder, name, *place)
    return asked.answered_by(model, name, pair.objective, BATCH, progress)
