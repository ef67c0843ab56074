"""Differences between two models on the same text, with their paired standard errors. Tensors
and numbers only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of a candidate's divergence the share that it counts as losing at least, whatever text says.
_LEAST_SHARE = 0.1


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


def weighed_losses(
    divergences_CW: Tensor, excess_CW: Tensor, mended_C: Tensor | float = 0.0
) -> Tensor:
    """What candidates lose, `(C,)`, nats a token, from their mean divergences from a dense model,
    `(candidates, windows)`, and from what they lose on the text of these windows, likewise.

    A divergence varies little from text to text, but is what text loses only where the dense model
    is right about text. So divergences count, and by how much text loses more than that, over the
    same of the candidate that diverges least, shrunk by its paired standard error as James and
    Stein do: by `1 - (error / difference)^2`, to nothing where it is within one error. What more
    text mends, `mended_C`, is taken off.
    """
    means_C = divergences_CW.mean(1)
    if excess_CW.shape[1] == 1:  # how much text tells is not known
        return means_C - mended_C
    more_CW = excess_CW - divergences_CW
    more_CW = more_CW - more_CW[means_C.argmin()]
    more_C, error_C = more_CW.mean(1), more_CW.std(1) / math.sqrt(more_CW.shape[1])
    share_C = 1 - (error_C / more_C) ** 2
    # Of the candidate itself there is no share: NaN.
    weighed_C = means_C + share_C.nan_to_num(0.0).clamp_min(0) * more_C
    return torch.maximum(weighed_C - mended_C, _LEAST_SHARE * means_C)
