"""What all objectives of rows have in common, be the rows labelled or not."""

from functools import partial
from typing import Any

from torch import Tensor

from sp3llm.models.objectives.schema import Objective, Recipe
from sp3llm.models.task_head import Logits, backward_answers, row_divergences, row_losses
from sp3llm.text.examples import Examples, joined
from sp3llm.text.labels import Labels
from sp3llm.text.task_sets import TaskSet, drawn
from sp3llm.text.tasks import Task

# As SP3 weighs them.
ENCODER_RECIPE = Recipe(
    steps=None,
    epochs=5,
    lr_of_weights=0.015,  # measured at a width of 144 (eval/NOTES.md)
    far=None,
    temperature=2.0,
    kl_weight=0.3,
    hidden_weight=0.7,
    stop_windows=512,
    # A closed form answers so well that only the end of a schedule does better.
    patience=10,
)


def _calibration_rows(
    task: Task, tokenizer: Any, samples: int, seq_len: int, seed: int, labels: Labels | None = None
) -> TaskSet:
    """At most `samples` training rows of a task, of which none decides when to stop; called with
    the task itself (`text.tasks.task_for`) in place of the names of text sets.
    """
    return drawn(task, tokenizer, samples, seq_len, seed, labels=labels)


def _training_rows(
    task: Task,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    exclude: frozenset[str],
    stopping: bool = False,
    labels: Labels | None = None,
) -> TaskSet:
    """Rows to learn from, or to decide when to stop (`text.task_sets.drawn`)."""
    return drawn(task, tokenizer, samples, seq_len, seed, exclude, stopping, labels)


def _of_rows(logits: Tensor, _: Tensor) -> Tensor:
    """Labels are the same in any vocabulary."""
    return logits


def _real_tokens(batch: Examples) -> Tensor:
    """The mask of attention."""
    return batch.attention_mask


def _scored(logits: Tensor) -> Tensor:
    """All of them."""
    return logits


row_objective = partial(
    Objective,
    calibration_windows=_calibration_rows,
    training_windows=_training_rows,
    join=joined,
    inputs=Examples.inputs,
    real_tokens=_real_tokens,
    in_rows=Examples.reread,
    of_rows=_of_rows,
    scored=_scored,
    recipe=ENCODER_RECIPE,
    states_are_stream=True,
)
"""An objective of rows, of which the fields that differ are still to be said."""


def answering_objective(logits: Logits, **fields: Any) -> Objective:
    """An objective of rows that a model answers by `logits`; `fields` are the others'."""
    return row_objective(
        logits=logits,
        losses=partial(row_losses, logits),
        divergences=partial(row_divergences, logits),
        loss_gradients=partial(backward_answers, logits, ENCODER_RECIPE.temperature),
        **fields,
    )
