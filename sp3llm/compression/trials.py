"""Trials of shapes: whole refits on a little text, and how far from the dense model they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.building import refitted_side_by_side
from sp3llm.compression.refitter import Refitter
from sp3llm.models.checkpoint import head_tensors
from sp3llm.models.head import End
from sp3llm.models.shapes import resized_config
from sp3llm.models.stream import LayeredModel, Stream


def refitted_ends(refitters: Sequence[Refitter], tokens: Tensor) -> tuple[list[End], End]:
    """Several refitted models and the dense one behind their last layers, on those of this
    process's windows that no fit saw. Nothing is written: streams go through each layer as it is
    fitted.
    """
    first = refitters[0]
    family, config, execution = first.family, first.dense.config, first.execution
    tables, heads = {}, {}
    for side, finished in refitted_side_by_side(refitters, tokens):
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


def trial_losses(refitters: Sequence[Refitter], tokens: Tensor) -> list[float]:
    """How far each of several refitted models is from the dense one, on the windows no fit saw: the
    mean divergence of what it predicts from what the dense model does, in nats a token.

    That is what a loss on text grows by where the dense model is right about text, and varies much
    less from text to text.
    """
    first, losses = refitters[0], []
    ends, dense = refitted_ends(refitters, tokens)
    for small in ends:
        found = first.objective.divergences(small, dense)
        total = torch.tensor([found.sum(), found.numel()], dtype=torch.float64)
        first.execution.ranks.all_reduce_(total)
        losses.append((total[0] / total[1]).item())
    return losses
