"""What the models of a recovery are measured to be worth."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sp3llm.reporting.record import RecoveredFigure

if TYPE_CHECKING:
    from sp3llm.maths.paired import Excess


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of the dense model, the one before and the recovered one: on text, or on a task's rows."""

    dense_perplexity: float | None = None
    perplexity_before: float | None = None
    perplexity: float | None = None
    excess_before: "Excess | None" = None
    """Of the model before over the dense one, nats a token."""
    excess: "Excess | None" = None
    scores: tuple[RecoveredFigure, ...] = ()
    """On a task."""
