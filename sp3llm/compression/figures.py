"""What the models of a compression are measured to be worth: on text, or on a task's rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sp3llm.compression.job import Job

if TYPE_CHECKING:
    from torch import Tensor

    from sp3llm.maths.paired import Excess
    from sp3llm.reporting.record import TaskFigure
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


def text_figures(
    job: Job, held_out: "HeldOut", losses: "Tensor", dense_losses: "Tensor"
) -> Figures:
    """From the losses of both models on the held-out windows, `(windows, tokens - 1)`, nats."""
    from sp3llm.maths.paired import excess_log_perplexity

    nats, dense_nats = held_out.small_nats(losses), held_out.dense_nats(dense_losses)
    merit, excess = job.objective.merit, excess_log_perplexity(nats, dense_nats)
    return Figures(merit(dense_nats), merit(nats), excess)
