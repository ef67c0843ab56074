"""Differences between two models on the same text, with their paired standard errors. Tensors
and numbers only.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Excess:
    """Log-perplexity of a model over another's on the same tokens."""

    mean: float
    """Mean difference of the loss, nats a token."""
    standard_error: float
    """Its paired standard error: windows are the independent units, tokens in one are not."""

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        known = math.isfinite(self.standard_error)
        return {
            "mean": self.mean,
            "paired_standard_error": self.standard_error if known else None,
        }

    def __str__(self) -> str:
        """`0.0614 ± 0.0028`, or the mean alone where one window leaves the error unknown."""
        known = math.isfinite(self.standard_error)
        return f"{self.mean:.4f}" + (f" ± {self.standard_error:.4f}" if known else "")


def perplexity(losses: Tensor) -> float:
    """`exp` of the mean loss, from token losses in nats."""
    return math.exp(losses.mean().item())


def excess_log_perplexity(losses: Tensor, baseline: Tensor) -> Excess:
    """Compare token losses `(windows, tokens)` with a baseline's on the same windows.

    With a single window the standard error is NaN.
    """
    differences = (losses - baseline).mean(1)
    count = len(differences)
    spread = differences.std().item() if count > 1 else math.nan
    return Excess(differences.mean().item(), spread / math.sqrt(count))
