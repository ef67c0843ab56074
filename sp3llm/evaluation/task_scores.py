"""How well models answer the rows of a task that are reported on, paired by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sp3llm.errors import UserError, reason
from sp3llm.evaluation.comparison import Row, paired_standard_error
from sp3llm.evaluation.task_answers import Questions, answers_of, questions_of
from sp3llm.evaluation.task_metrics import metrics_of
from sp3llm.models.objectives.schema import Objective
from sp3llm.text.examples import Examples, joined
from sp3llm.text.labels import Labels, class_numbers
from sp3llm.text.task_rows import evaluation_rows
from sp3llm.text.task_sets import TaskSet
from sp3llm.text.tasks import Task, usual_length

if TYPE_CHECKING:
    from rich.progress import Progress

# For the standard error of what is no mean over rows: of that itself within a twentieth.
_RESAMPLES = 200

Answers = Mapping[str, Sequence[Any]]
"""By split what a model answers to every row (`task_answers.answers_of`)."""


@dataclass(frozen=True)
class Reported:
    """All rows of a task that are reported on: those of its validation splits."""

    task: Task
    labels: Labels
    seq_len: int
    """Tokens a row at most."""
    splits: Mapping[str, Questions]
    """By the name of the task with what its split adds."""

    @property
    def documents(self) -> frozenset[str]:
        """Content hashes of the rows."""
        return frozenset().union(*(asked.documents for asked in self.splits.values()))

    @property
    def tokens(self) -> Examples:
        """The rows, or stretches of contexts, of all splits, one split after the other."""
        return joined([asked.examples for asked in self.splits.values()])

    @property
    def examples(self) -> int:
        """How many rows, or stretches of contexts, a model is run on."""
        return sum(len(asked.examples) for asked in self.splits.values())

    def answered_by(
        self, model: nn.Module, name: str, objective: Objective, batch: int, progress: "Progress"
    ) -> Answers:
        """What a stock model, called `name`, answers to them, `batch` at once."""
        bar = progress.add_task(f"{name}, answers", total=self.examples)
        return {
            split: answers_of(
                model, objective, asked, batch, lambda done: progress.advance(bar, done)
            )
            for split, asked in self.splits.items()
        }

    def describe(self) -> dict[str, Any]:
        """What `sp3llm.json` records of these rows."""
        return TaskSet(self.tokens, self.task.sources, self.documents).describe()


def reported(task: Task, labels: Labels, tokenizer: Any, seq_len: int) -> Reported:
    """The rows that a task reports on, for a model that predicts `labels`.

    Raises UserError if there are none, or one is not as the task says.
    """
    rows = evaluation_rows(task)
    splits = {
        name: questions_of(some, task, labels, tokenizer, seq_len) for name, some in rows.items()
    }
    return Reported(task, labels, seq_len, splits)


def row_length(task: Task, config: Mapping[str, Any], tokenizer: Any, asked: int | None) -> int:
    """Tokens a row at most: `asked` (`--seq-len`), else as papers have it, or what the model has
    positions for if fewer.

    Raises UserError if more are asked for than the model has positions.
    """
    positions = min(config.get("max_position_embeddings", 512), tokenizer.model_max_length)
    if asked is not None and asked > positions:
        raise UserError(
            f"Expected --seq-len of at most {positions}, the model's positions, found {asked}: "
            "give a smaller one."
        )
    return asked or min(usual_length(task.kind or ""), positions)


def load_model(
    folder: str | Path,
    name: str,
    objective: Objective,
    device: torch.device,
    dtype: str,
    config: Any = None,
) -> nn.Module:
    """The stock model, to be asked; `name` is what it is called, to show, and `config` its config
    where the folder has none.

    Raises UserError if it does not load whole.
    """
    from sp3llm.models.stock import check_found

    try:
        model, info = objective.stock_class().from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **({"config": config} if config else {})
        )
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"Cannot load the model '{name}' ({type(error).__name__}: {reason(error)}): check that "
            "plain transformers loads it."
        ) from error
    check_found(name, info)
    return model.requires_grad_(False).eval().to(device)


def score_rows(
    reported: Reported,
    small: Mapping[str, Sequence[Any]],
    dense: Mapping[str, Sequence[Any]] | None,
) -> list[Row]:
    """Every metric on every split, of one model's answers beside another's on the same rows.

    The standard error of a figure that is a mean over rows is that of the mean; of others it is
    resampled (`comparison.paired_standard_error`).
    """
    rows = []
    positive = class_numbers(reported.task, reported.labels)[-1]
    for name, asked in reported.splits.items():
        pairs = [
            None if found is None else list(zip(found[name], asked.truths, strict=True))
            for found in (small, dense)
        ]
        for metric in metrics_of(reported.task, reported.labels, positive):
            of_a_row = metric.of_a_row
            if of_a_row is None:
                items, aggregate = pairs, metric.figure
            else:
                items = [p and [of_a_row(*pair) for pair in p] for p in pairs]
                aggregate = None
            own, other = items
            rows.append(
                Row(
                    task=name,
                    metric=metric.name,
                    samples=len(asked.truths),
                    small=metric.figure(pairs[0]),
                    standard_error=paired_standard_error(own, None, aggregate, _RESAMPLES),
                    higher_is_better=True,
                    dense=None if other is None else metric.figure(pairs[1]),
                    paired_standard_error=(
                        None
                        if other is None
                        else paired_standard_error(own, other, aggregate, _RESAMPLES)
                    ),
                )
            )
    return rows
