"""Carry a loss's gradient down through a stock model, a layer at a time, by its own forward."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sp3llm.maths.moments import root_mean_square
from sp3llm.models.causal_blocks import CausalBlocks
from sp3llm.models.families import Family
from sp3llm.models.hooks import inputs_of, materialized, outputs_of
from sp3llm.models.stock import fuse_experts
from sp3llm.models.stream import LayeredModel, Stream, batches
from sp3llm.runtime.transfer import fetch, fetched, settle, store


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of a loss in one layer, of some windows, each `(windows, tokens, D)`, in the dtype
    of the stream, on the device that computes.
    """

    by_site: list[Tensor]
    """By what the readers of each site read: the norm's output, and in a post-norm family the
    stream itself, all that follows from it included."""
    behind: list[Tensor]
    """By the stream behind each writer, times that stream's root mean square there: what an error
    costs that is relative to the stream, as the next norm will read it."""


def backward_layer(
    model: LayeredModel,
    index: int,
    tensors: Mapping[str, Tensor],
    stream: Stream,
    upstream: Tensor,
) -> Iterator[tuple[slice, LayerGradients]]:
    """Carry a loss's gradient by the output of layer `index` down to its input, which `stream` is.

    `upstream` is that gradient, `(windows, tokens, D)` like the stream, and becomes the one by the
    input, in place, as batches are taken; `tensors` are the layer's weights by their names on disk.

    Yields which windows a batch is of, and its gradients within the layer.
    """
    layer, family, execution = model.layer(index), model.family, model.execution
    norms = [layer.get_submodule(site.norm) for site in family.sites]
    taken = _taken_post_norm if family.post_norm else _taken_pre_norm
    windows = [slice(row, row + 1) for row in range(len(stream.hidden))]
    if stream.real is not None:  # rows that are padded alike go together
        windows = batches(stream.hidden, execution)
    with materialized(model.module, fuse_experts(family, index, tensors), execution):
        for rows, x in fetched(stream.hidden, windows, execution.device):
            batch = x.requires_grad_()
            with CausalBlocks(), inputs_of(*norms) as read, outputs_of(*norms) as normalised:
                output = layer(batch, **stream.arguments(rows, index))
            output = output[0] if isinstance(output, tuple) else output
            upper = fetch(upstream[rows], execution.device)
            below, by_site, behind = taken(family, batch, (read, normalised, output), upper)
            store(upstream[rows], below, execution.device)
            of_dtype = [[one.to(x.dtype) for one in some] for some in (by_site, behind)]
            yield rows, LayerGradients(*of_dtype)
    settle(execution.device)


_Forward = tuple[list[Tensor], list[Tensor], Tensor]
"""What the norms of a layer read and gave, in the order they ran, and what the layer gave."""
_Taken = tuple[Tensor, list[Tensor], list[Tensor]]
"""What `LayerGradients` has, of one batch."""


def _taken_pre_norm(family: Family, batch: Tensor, forward: _Forward, upper: Tensor) -> _Taken:
    read, normalised, output = forward
    # Where blocks are parallel a norm reads the layer's input, and behind each is the end.
    behind = [*(output if x is batch else x for x in read[1:]), output]
    wanted = [batch, *normalised, *(x for x in behind if x is not output)]
    below, *gradients = torch.autograd.grad(output, wanted, upper)
    by_site, rest = gradients[: len(normalised)], gradients[len(normalised) :]
    by_stream = [upper if x is output else rest.pop(0) for x in behind]
    relative = [_relative(family, *pair) for pair in zip(by_stream, behind, strict=True)]
    return below, by_site, relative


def _taken_post_norm(family: Family, batch: Tensor, forward: _Forward, upper: Tensor) -> _Taken:
    read, normalised, output = forward
    streams = [batch, *normalised[:-1]]
    gradients = torch.autograd.grad(output, [*streams, *read], upper)
    by_site, by_sum = gradients[: len(streams)], gradients[len(streams) :]
    behind = [_relative(family, *pair) for pair in zip(by_sum, read, strict=True)]
    return by_site[0], list(by_site), behind


def _relative(family: Family, gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * root_mean_square(x.detach(), family.centred)
