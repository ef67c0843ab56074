"""Run a stock model layer by layer, by its own forward.

The model is built from its config with weights on the meta device. Its own `forward` is called
with recorders in place of the layers, which tells what each layer is called with (masks, rotary
embeddings) without a line of it being copied; then the weights of one layer at a time are placed,
all windows go through it, and the weights go again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError
from sp3llm.models.families import Family
from sp3llm.models.hooks import (
    Arities,
    Probe,
    Recorder,
    arities_noted,
    bypassed,
    materialized,
    outputs_of,
    probed,
    replaced,
    zeroed_blocks,
)
from sp3llm.models.stock import by_parameter
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.memory import trim_memory


@dataclass(frozen=True)
class Stream:
    """The residual stream of a set of windows, between two layers."""

    hidden: Tensor
    """`(windows, tokens, D)` in the room that streams have, replaced in place as layers run."""
    calls: Mapping[int, list[dict[str, Any]]]
    """By number of windows in a batch: the keyword arguments of every layer."""


def _batches(windows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, windows)) for start in range(0, windows, size)]


def _rows(windows: Tensor, execution: Execution) -> list[slice]:
    """The batches that windows, `(windows, tokens, ...)`, go through a layer in."""
    return _batches(len(windows), execution.windows_a_batch(windows.shape[1]))


@torch.no_grad()
def open_stream(
    model: nn.Module,
    family: Family,
    embeddings: Mapping[str, Tensor],
    tokens: Tensor,
    execution: Execution,
    saved: Tensor | None = None,
) -> Stream:
    """Embed `tokens` (`(windows, tokens)`) by the stock forward and note each layer's arguments.

    With `saved`, `(windows, tokens, D)`, the stream is that one, as it once stood between two
    layers.

    Raises UserError if the embeddings yield NaN or infinity.
    """
    recorders = [Recorder() for _ in model.get_submodule(family.layers_module)]
    hidden: Tensor | None = None
    calls: dict[int, list[dict[str, Any]]] = {}
    decoder = model.get_submodule(family.layers_module.rpartition(".")[0])
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(execution.device))
    with (
        materialized(model, embeddings, execution),
        replaced(model, family.layers_module, nn.ModuleList(recorders)),
        bypassed(model, [family.final_norm, *(family.projections or ())[1:]]),
    ):
        # One window by itself too: the backward pass goes window by window. A process without a
        # window of its own needs the stream's width all the same.
        for rows in [None, *_rows(tokens, execution)]:
            batch = tokens.new_zeros(1, tokens.shape[1]) if rows is None else tokens[rows]
            if len(batch) in calls and saved is not None:
                continue
            decoder(input_ids=batch.to(execution.device), use_cache=False)
            embedded = recorders[0].hidden
            calls.setdefault(len(batch), [recorder.kwargs for recorder in recorders])
            if hidden is None:
                hidden = execution.empty_stream((*tokens.shape, embedded.shape[-1]), embedded.dtype)
            if rows is not None and saved is None:
                hidden[rows] = embedded.to(hidden.device)
    if saved is not None:
        hidden.copy_(saved)
    _check_finite(hidden, "the embeddings")
    return Stream(hidden, calls)


@torch.no_grad()
def run_layer(
    model: nn.Module,
    family: Family,
    index: int,
    tensors: Mapping[str, Tensor],
    streams: list[tuple[Stream, Mapping[str, Probe]]],
    execution: Execution,
    stop_before: str | None = None,
    zeroed: "Mapping[str, int | None]" = MappingProxyType({}),
    arities: "Arities | None" = None,
) -> None:
    """Send each stream through layer `index`, in place, with its weights placed for that long.

    Each stream comes with probes by module name, relative to the layer, which see that module's
    input. With `stop_before` the layer runs up to that module only, and the streams stay as they
    are. Submodules in `zeroed` do not run: zeros stand for what they would have added to the
    stream, in as many values as they return. `arities` has submodules as keys and is told how many
    that is.

    Raises UserError, naming the layer, if its output holds NaN or infinity.
    """
    layer = model.get_submodule(family.layers_module)[index]
    by_class = by_parameter(family, index, tensors)
    with materialized(model, by_class, execution), arities_noted(layer, arities):
        for stream, probes in streams:
            hidden = stream.hidden
            for rows in _rows(hidden, execution):
                batch = hidden[rows].to(execution.device)
                with probed(layer, rows, probes, stop_before), zeroed_blocks(layer, batch, zeroed):
                    output = layer(batch, **stream.calls[len(batch)][index])
                    output = output[0] if isinstance(output, tuple) else output
                    hidden[rows] = output.to(hidden.device)
            if stop_before is None:
                _check_finite(hidden, f"layer {index}")
    trim_memory()


@torch.no_grad()
def add_to_stream(
    stream: Stream,
    inputs: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: float,
    execution: Execution,
    where: str,
) -> None:
    """Add a linear writer's output to the stream, in place, as the stock layer would.

    `inputs` `(windows, tokens, P)` anywhere, of which `weight`, `(K, kept)`, reads those at the
    indices `kept` (None: all), `bias` `(K,)`, `multiplier` the family's on all that is added.

    Raises UserError, saying where, if the stream then holds NaN or infinity.
    """
    weight = weight.to(execution.device, execution.dtype)
    bias = None if bias is None else bias.to(execution.device, execution.dtype)
    hidden = stream.hidden
    for rows in _rows(inputs, execution):
        read = inputs[rows].to(execution.device)
        read = read if kept is None else read[..., kept]
        written = nn.functional.linear(read, weight, bias)
        moved_on = hidden[rows].to(execution.device) + written * multiplier
        hidden[rows] = moved_on.to(hidden.device)
    _check_finite(stream.hidden, where)


def probe_stream(stream: Stream, probe: Probe, execution: Execution) -> None:
    """Show the stream as it stands (after the last layer: what the final norm reads)."""
    for rows in _rows(stream.hidden, execution):
        probe(rows, stream.hidden[rows].to(execution.device))


def backward_layer(
    model: nn.Module,
    family: Family,
    index: int,
    tensors: Mapping[str, Tensor],
    stream: Stream,
    upstream: Tensor,
    norms: list[str],
    execution: Execution,
) -> tuple[Tensor, list[Tensor]]:
    """Carry a gradient down through layer `index`, whose input is `stream`.

    Returns the gradient by that input and, for each norm named, by the norm's output.
    """
    layer = model.get_submodule(family.layers_module)[index]
    below = torch.empty_like(stream.hidden)
    by_norm = [torch.empty_like(stream.hidden) for _ in norms]
    with materialized(model, by_parameter(family, index, tensors), execution):
        for row in range(len(stream.hidden)):
            rows = slice(row, row + 1)
            batch = stream.hidden[rows].to(execution.device).requires_grad_()
            with outputs_of(*(layer.get_submodule(norm) for norm in norms)) as seen:
                output = layer(batch, **stream.calls[1][index])
            output = output[0] if isinstance(output, tuple) else output
            upper = upstream[rows].to(execution.device)
            gradients = torch.autograd.grad(output, [batch, *seen], upper)
            for store, gradient in zip((below, *by_norm), gradients, strict=True):
                store[rows] = gradient.reshape(batch.shape).to(store.device)
    return below, by_norm


def _check_finite(hidden: Tensor, where: str) -> None:
    # The sum is an order of magnitude cheaper than looking at every value, and finite only if
    # all are; finite values whose sum overflows are looked at.
    total = hidden.sum(dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not torch.isfinite(total) and not torch.isfinite(hidden).all():
        raise UserError(
            f"The activations after {where} hold NaN or infinity: try --dtype float32, or an "
            "undamaged copy of the checkpoint."
        )
