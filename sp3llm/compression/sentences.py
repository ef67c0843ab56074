"""An encoder without a head: the texts it is calibrated on, and whether its cosines stay."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sp3llm.compression.figures import stock_model
from sp3llm.compression.job import Job
from sp3llm.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.reporting.record import TaskFigure
    from sp3llm.text.examples import Examples
    from sp3llm.text.task_rows import Row
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.tasks import Task

# Held-out texts at most, of all pairs of which the cosine is taken.
_MOST_TEXTS = 1024


def read_texts_of_rows(job: Job) -> "tuple[TaskSet, TaskSet]":
    """Texts of a task's training rows to calibrate on, and of its validation rows; each text of a
    pair is one of its own.

    Raises UserError if there are too few.
    """
    from sp3llm.text.task_rows import evaluation_rows
    from sp3llm.text.tasks import resolve_task

    task = resolve_task(job.settings.task or "")
    rows = [row for rows in evaluation_rows(task).values() for row in _texts(rows)]
    held_out = _encoded(job, task, _shuffled(rows, 0)[:_MOST_TEXTS], 3)
    return read_texts_to_learn_from(job, held_out.documents, job.settings.calibrated), held_out


def read_texts_to_learn_from(job: Job, known: frozenset[str], samples: int) -> "TaskSet":
    """At most so many texts of a task's training rows, none of which has a hash among `known`.

    Raises UserError if there are too few.
    """
    from sp3llm.text.task_rows import training_rows
    from sp3llm.text.tasks import resolve_task

    task = resolve_task(job.settings.task or "")
    rows = [row for row in _texts(training_rows(task)) if row.digest not in known]
    return _encoded(job, task, _shuffled(rows, job.settings.seed)[:samples], 2)


def _encoded(job: Job, task: "Task", rows: "Sequence[Row]", least: int) -> "TaskSet":
    from sp3llm.evaluation.task_scores import row_length
    from sp3llm.text.encoding import encoded
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.tokenizer import load_row_tokenizer

    if len(rows) < least:
        raise UserError(
            f"Expected at least {least} texts in the training and in the validation rows of "
            f"'{task.name}', found {len(rows)}: give the task more rows."
        )
    tokenizer = load_row_tokenizer(job.dense.folder)
    seq_len = row_length(task, job.dense.config, tokenizer, job.settings.seq_len)
    examples = encoded(rows, tokenizer, seq_len)
    return TaskSet(examples, task.sources, examples.documents)


def _texts(rows: "Sequence[Row]") -> "list[Row]":
    """Each text of the rows as a row, once."""
    from sp3llm.text.task_rows import Row

    texts = {text: Row((text,), None, row.origin) for row in rows for text in row.texts}
    return list(texts.values())


def _shuffled(rows: "Sequence[Row]", seed: int) -> "list[Row]":
    """In an order that follows from a seed and their content."""
    ordered = sorted(rows, key=lambda row: row.digest)
    random.Random(seed).shuffle(ordered)
    return ordered


def cosine_figures(
    job: Job, held_out: "TaskSet", small: "Checkpoint", progress: "Progress"
) -> "tuple[TaskFigure, ...]":
    """How well the cosines of all pairs of held-out texts, pooled over their tokens, correlate with
    the dense model's.
    """
    import torch

    from sp3llm.evaluation.task_metrics import correlation
    from sp3llm.reporting.record import TaskFigure

    cosines = [
        _cosines(job, checkpoint, held_out.tokens, progress, what)
        for checkpoint, what in ((small, "compressed model"), (job.dense, "dense model"))
    ]
    above = torch.triu_indices(len(cosines[0]), len(cosines[0]), 1)
    pairs = [one[above[0], above[1]].numpy() for one in cosines]
    return tuple(
        TaskFigure(
            task=held_out.sources[0],
            metric=f"{name} of cosines",
            samples=len(cosines[0]),
            dense=1.0,
            small=correlation(found, *pairs),
            paired_standard_error=None,
        )
        for name, found in (("Pearson", "pearsonr"), ("Spearman", "spearmanr"))
    )


def _cosines(
    job: Job, checkpoint: "Checkpoint", texts: "Examples", progress: "Progress", what: str
) -> "Tensor":
    """Cosines of all pairs of texts, `(texts, texts)`, float64, on the host."""
    import torch
    from torch.nn import functional

    from sp3llm.evaluation.score_task import BATCH

    model = stock_model(job, checkpoint)
    bar = progress.add_task(f"{what}, cosines", total=len(texts))
    pooled = []
    for batch in texts.split(BATCH):
        some = batch.to(job.execution.device)
        with torch.no_grad():
            states = model(**some.inputs()).last_hidden_state
        real = some.attention_mask[..., None].to(states)
        pooled.append(((states * real).sum(1) / real.sum(1)).double().cpu())
        progress.advance(bar, len(batch))
    directions = functional.normalize(torch.cat(pooled), dim=-1)
    return directions @ directions.T
