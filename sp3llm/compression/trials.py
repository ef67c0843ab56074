"""Trials of shapes: whole refits on a little text, and how far from the dense model they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sp3llm.compression.building import refitted_side_by_side
from sp3llm.compression.dense_runs import DenseRuns
from sp3llm.compression.ends import dense_end, on_tokens, on_windows, small_end
from sp3llm.compression.refitter import Refitter
from sp3llm.maths.paired import weighed_losses
from sp3llm.models.head import End

# On fewer windows losses on text say more of the windows than of the models.
_ENOUGH_TEXT = 16
# What is lost on text that was fitted to only corrects what is lost on other text: of one of so
# many of its tokens it is known well enough, and logits are much of what a trial costs.
_EVERY = 4


def refitted_ends(
    refitters: Sequence[Refitter], tokens: Tensor, runs: DenseRuns | None = None
) -> tuple[list[End], End]:
    """Several refitted models and the dense one behind their last layers, on those of this
    process's windows that no fit saw. Nothing is written: streams go through each layer as it is
    fitted. For `runs` see `building.refitted_groups`.
    """
    first = refitters[0]
    unseen = first.execution.local_windows(*tokens.shape) >= first.unseen_from
    return _ends(refitters, tokens, runs)(unseen)


def _ends(
    refitters: Sequence[Refitter], tokens: Tensor, runs: DenseRuns | None
) -> Callable[[Tensor], tuple[list[End], End]]:
    """`refitted_ends` of whichever of this process's windows a boolean tensor says."""
    tables, heads = {}, {}
    for side, finished in refitted_side_by_side(refitters, tokens, runs=runs):
        if finished.group.name == "embeddings":
            tables[side] = finished.tensors[refitters[0].family.embedding]
        elif finished.group.name == "head":
            heads[side] = finished
    small = [
        small_end(refitter, heads[side].tensors, tables[side], heads[side].small)
        for side, refitter in enumerate(refitters)
    ]
    dense = dense_end(refitters[0], heads[0].dense)

    def of_windows(chosen: Tensor) -> tuple[list[End], End]:
        return [on_windows(end, chosen) for end in small], on_windows(dense, chosen)

    return of_windows


@dataclass(frozen=True)
class Trial:
    """What a refitted model loses, a number a window; if not said otherwise, of windows that no fit
    of it saw.
    """

    divergences: tuple[float, ...]
    """Mean divergence of what it predicts from what the dense model does, nats a token: what a loss
    on text grows by where the dense model is right about text."""
    fitted: tuple[float, ...]
    """The same of windows that were fitted to, of text at some of their tokens."""
    excess: tuple[float, ...] | None
    """By how much it loses more on the text than the dense model, nats a token, which varies much
    more; None where there is too little text to tell, or none."""


def trials_of(
    refitters: Sequence[Refitter], tokens: Tensor, runs: DenseRuns | None = None
) -> list[Trial]:
    """Several refitted models against the dense one, on the windows no fit saw; the same on every
    process. For `runs` see `building.refitted_groups`.
    """
    first = refitters[0]
    objective, execution = first.objective, first.execution
    local_windows = execution.local_windows(*tokens.shape)
    ends_on = _ends(refitters, tokens, runs)
    count = len(tokens) - first.unseen_from
    unseen = range(first.unseen_from, len(tokens))
    fitted = range(max(0, first.held_from - count), first.held_from)  # as many, if there are

    def own(windows: range) -> Tensor:
        return (local_windows >= windows.start) & (local_windows < windows.stop)

    def of_all(found: Tensor, windows: range) -> tuple[float, ...]:
        means = found.mean(1) if found.ndim > 1 else found  # a process may have none of them
        places = local_windows[own(windows)] - windows.start
        return tuple(execution.ranks.all_gather_rows(means, places, len(windows)).tolist())

    def losses(end: End) -> Tensor:
        return objective.losses(end.model, end.head, end.stream, tokens[local_windows[own(unseen)]])

    ends, dense = ends_on(own(unseen))
    ends_fitted, dense_fitted = ends_on(own(fitted))
    is_text = objective.evaluation_windows is not None
    if is_text:
        length = tokens.shape[1]
        places = slice(min(length, _EVERY) - 1, None, _EVERY)
        ends_fitted = [on_tokens(end, places) for end in ends_fitted]
        dense_fitted = on_tokens(dense_fitted, places)
    by_text = is_text and count >= _ENOUGH_TEXT
    of_dense = losses(dense) if by_text else None
    divergences = objective.divergences(ends, dense)
    of_fitted = objective.divergences(ends_fitted, dense_fitted)
    return [
        Trial(
            divergences=of_all(divergences[number], unseen),
            fitted=of_all(of_fitted[number], fitted),
            excess=of_all(losses(end) - of_dense, unseen) if by_text else None,
        )
        for number, end in enumerate(ends)
    ]


def losses_of(trials: Sequence[Trial], share: float = 1.0) -> list[float]:
    """What the models of trials on the same windows would lose, nats a token, fitted to as much
    text as the trials' is a `share` of.

    That is what they lose on text that no fit saw (`maths.paired.weighed_losses`), less what more
    text will mend: least squares of `P` inputs on `N` tokens misses about `P / N` more than it must
    on other text, and as much less on its own, so that half of the difference goes with `1 / N`
    (Mallows 1973).
    """
    divergences = torch.tensor([trial.divergences for trial in trials], dtype=torch.float64)
    fitted = torch.tensor([trial.fitted for trial in trials], dtype=torch.float64)
    mended = (1 - share) / 2 * (divergences.mean(1) - fitted.mean(1))
    if any(trial.excess is None for trial in trials):
        return (divergences.mean(1) - mended).tolist()
    excess = torch.tensor([trial.excess for trial in trials], dtype=torch.float64)
    return weighed_losses(divergences, excess, mended).tolist()
