"""What a recovery learns from and is judged by: text, or the rows of a task."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sp3llm.models.objectives.schema import Objective
from sp3llm.options import RecoverConfig
from sp3llm.recovery.figures import Figures
from sp3llm.recovery.inputs import Pair, Texts
from sp3llm.recovery.tasks import draw_rows, measure_rows, row_length_of, task_files
from sp3llm.recovery.texts import draw_texts, measure_texts, text_files, window_length_of


@dataclass(frozen=True)
class Subject:
    """Functions of a recovery that differ by what the models are for."""

    unit: str
    """What a batch is made of, in the plural."""
    files: Callable[[RecoverConfig, Pair], dict[str, Path]]
    """The local files that are read, by what they are called."""
    length: Callable[[RecoverConfig, Pair], int]
    """Tokens of a unit at most."""
    draw: Callable[[RecoverConfig, Pair], Texts]
    """What is learned from, what decides when to stop, and what is reported on."""
    measure: Callable[..., Figures]
    """`(pair, written checkpoint, texts, device, progress)`: what all three models are worth."""


_TEXT = Subject("windows", text_files, window_length_of, draw_texts, measure_texts)
_TASK = Subject("rows", task_files, row_length_of, draw_rows, measure_rows)


def subject_of(objective: Objective) -> Subject:
    """That of models that are for `objective`."""
    return _TEXT if objective.labels is None else _TASK
