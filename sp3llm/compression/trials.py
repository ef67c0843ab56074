"""Trials of shapes: whole refits on a little text, and how far from the dense model they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.building import refitted_side_by_side
from sp3llm.compression.dense_runs import DenseRuns
from sp3llm.compression.refitter import Refitter
from sp3llm.maths.paired import weighed_losses
from sp3llm.models.checkpoint import head_tensors
from sp3llm.models.head import End
from sp3llm.models.shapes import resized_config
from sp3llm.models.stream import LayeredModel, Stream

# On fewer windows losses on text say more of the windows than of the models.
_ENOUGH_TEXT = 16


def refitted_ends(
    refitters: Sequence[Refitter], tokens: Tensor, runs: DenseRuns | None = None
) -> tuple[list[End], End]:
    """Several refitted models and the dense one behind their last layers, on those of this
    process's windows that no fit saw. Nothing is written: streams go through each layer as it is
    fitted. For `runs` see `building.refitted_groups`.
    """
    first = refitters[0]
    family, config, execution = first.family, first.dense.config, first.execution
    tables, heads = {}, {}
    for side, finished in refitted_side_by_side(refitters, tokens, runs=runs):
        if finished.group.name == "embeddings":
            tables[side] = finished.tensors[family.embedding]
        elif finished.group.name == "head":
            heads[side] = finished
    unseen = execution.local_windows(*tokens.shape) >= first.unseen_from

    def end_of(model_config: Mapping[str, Any], head: Mapping[str, Tensor], stream: Stream) -> End:
        model = LayeredModel.of(model_config, family, first.objective, execution)
        real = None if stream.real is None else stream.real[unseen]
        return End(model, head, replace(stream, hidden=stream.hidden[unseen], real=real))

    small = []
    for side, refitter in enumerate(refitters):
        head = heads[side].tensors
        if refitter.shape.tie_word_embeddings:
            head = {**head, f"{family.head}.weight": tables[side]}
        small_config = resized_config(family, config, refitter.shape, refitter.layers)
        small.append(end_of(small_config, head, heads[side].small))
    return small, end_of(config, head_tensors(first.dense, family), heads[0].dense)


@dataclass(frozen=True)
class Trial:
    """What a refitted model loses on windows that no fit of it saw, a number a window."""

    divergences: tuple[float, ...]
    """Mean divergence of what it predicts from what the dense model does, nats a token: what a loss
    on text grows by where the dense model is right about text."""
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
    objective, execution, unseen_from = first.objective, first.execution, first.unseen_from
    ends, dense = refitted_ends(refitters, tokens, runs)
    local_windows = execution.local_windows(*tokens.shape)
    unseen = local_windows[local_windows >= unseen_from]
    count = len(tokens) - unseen_from

    def of_all(found: Tensor) -> tuple[float, ...]:
        means = found.mean(1) if found.ndim > 1 else found  # a process may have none of them
        return tuple(execution.ranks.all_gather_rows(means, unseen - unseen_from, count).tolist())

    def losses(end: End) -> Tensor:
        return objective.losses(end.model, end.head, end.stream, tokens[unseen])

    by_text = objective.evaluation_windows is not None and count >= _ENOUGH_TEXT
    of_dense = losses(dense) if by_text else None
    return [
        Trial(
            of_all(objective.divergences(small, dense)),
            of_all(losses(small) - of_dense) if by_text else None,
        )
        for small in ends
    ]


def losses_of(trials: Sequence[Trial]) -> list[float]:
    """What the models of trials on the same windows lose, nats a token
    (`maths.paired.weighed_losses`).
    """
    divergences = torch.tensor([trial.divergences for trial in trials], dtype=torch.float64)
    if any(trial.excess is None for trial in trials):
        return divergences.mean(1).tolist()
    excess = torch.tensor([trial.excess for trial in trials], dtype=torch.float64)
    return weighed_losses(divergences, excess).tolist()
