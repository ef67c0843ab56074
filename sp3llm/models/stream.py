"""Run a stock model layer by layer, by its own forward.

The model is built from its config with weights on the meta device. Its own `forward` is called
with recorders in place of the layers, which tells what each layer is called with (masks, rotary
embeddings) without a line of it being copied; then the weights of one layer at a time are placed,
all windows go through it, and the weights go again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError
from sp3llm.models.causal_blocks import CausalBlocks
from sp3llm.models.families import Family
from sp3llm.models.hooks import (
    Probe,
    materialized,
    probed,
    zeroed_blocks,
)
from sp3llm.models.objectives.schema import Objective
from sp3llm.models.stock import empty_model, fuse_experts
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.transfer import fetch, fetched, settle, store


@dataclass(frozen=True)
class Stream:
    """The residual stream of a set of windows, between two layers."""

    hidden: Tensor
    """`(windows, tokens, D)` in the room that streams have, replaced in place as layers run."""
    calls: Mapping[tuple[int, int], list[dict[str, Any]]]
    """By batch (`call_key`): the keyword arguments of every layer."""
    real: Tensor | None = None
    """Which tokens are real, `(windows, tokens)`, bool, where rows are padded; None: all are."""

    def arguments(self, rows: slice, layer: int) -> dict[str, Any]:
        """What layer number `layer` is called with for a batch, beside the stream."""
        return self.calls[call_key(rows, self.real is not None)][layer]


def call_key(rows: slice, padded: bool) -> tuple[int, int]:
    """What a batch's calls are kept under: batches of as many windows share them, but where their
    rows are padded each in its own way.
    """
    return (rows.start, rows.stop) if padded else (0, rows.stop - rows.start)


def first_tokens(stream: Stream) -> Stream:
    """The stream of the first token of every window, which a task's head may read alone."""
    return Stream(stream.hidden[:, :1], stream.calls)


@dataclass(frozen=True)
class LayeredModel:
    """A stock model that is run layer by layer, its weights on the meta device but for those that
    are placed to run.
    """

    module: nn.Module
    family: Family
    execution: Execution
    """Where and in which arithmetic it runs."""

    @staticmethod
    def of(
        config: Mapping[str, Any], family: Family, objective: Objective, execution: Execution
    ) -> "LayeredModel":
        """The model of a config, without weights. Raises UserError if transformers rejects it."""
        return LayeredModel(empty_model(config, objective), family, execution)

    def layer(self, index: int) -> nn.Module:
        """The module of one layer."""
        return self.module.get_submodule(self.family.layers_module)[index]


@dataclass(frozen=True)
class LayerPart:
    """Which part of a layer runs; modules are named relative to the layer."""

    stop_before: str | None = None
    """The layer runs up to this module only, and the streams stay as they are; None: to its end."""
    zeroed: Mapping[str, int | None] = field(default_factory=dict)
    """Modules that do not run, zeros standing for what they would have added to the stream, by how
    many values they return (see `models.hooks.value_counts`)."""
    handing_on: tuple[str, ...] = ()
    """Modules that do not run and hand on what they are given."""


WHOLE_LAYER = LayerPart()

OUTPUT = "the layer's output"
"""In place of a module's name: a probe of `run_layer` that sees what the layer returns."""


@dataclass(frozen=True)
class LinearWriter:
    """A matrix that adds to the stream, as `add_to_stream` applies it."""

    name: str
    """What a refusal calls it."""
    weight_KP: Tensor
    bias_K: Tensor | None
    kept_P: Tensor | None
    """Which of its inputs, by index, the weight reads; None: all."""
    multiplier: float
    """The family's factor on what is added to the stream."""


def batches(windows: Tensor, execution: Execution) -> list[slice]:
    """The batches that windows, `(windows, tokens, ...)`, go through a layer in."""
    count, size = len(windows), execution.windows_a_batch(windows.shape[1])
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _fetched(hidden: Tensor, execution: Execution) -> Iterator[tuple[slice, Tensor]]:
    """The batches that a stream goes through a layer in, on the device that computes."""
    return fetched(hidden, batches(hidden, execution), execution.device)


@torch.no_grad()
def run_layer(
    model: LayeredModel,
    index: int,
    tensors: Mapping[str, Tensor],
    streams: list[tuple[Stream, Mapping[str, Probe]]],
    part: LayerPart = WHOLE_LAYER,
) -> None:
    """Send each stream through layer `index`, or a part of it, in place, with the layer's weights,
    `tensors` by their names on disk, placed for that long.

    Each stream comes with probes by module name, relative to the layer, which see that module's
    input; one by the name `OUTPUT` sees the layer's.

    Raises UserError, naming the layer, if its output holds NaN or infinity.
    """
    layer, execution = model.layer(index), model.execution
    by_class, seen = fuse_experts(model.family, index, tensors), FiniteSums()
    with materialized(model.module, by_class, execution), CausalBlocks():
        for stream, probes in streams:
            hidden = stream.hidden
            for rows, batch in _fetched(hidden, execution):
                inner = {name: probe for name, probe in probes.items() if name != OUTPUT}
                with (
                    probed(layer, rows, inner, part.stop_before),
                    zeroed_blocks(layer, batch, part.zeroed, part.handing_on),
                ):
                    output = layer(batch, **stream.arguments(rows, index))
                    output = output[0] if isinstance(output, tuple) else output
                    seen.add(output)
                    store(hidden[rows], output, execution.device)
                    if OUTPUT in probes:
                        probes[OUTPUT](rows, output)
    settle(execution.device)
    seen.check([stream.hidden for stream, _ in streams], f"layer {index}")


@torch.no_grad()
def add_to_stream(
    stream: Stream, inputs: Tensor, writer: LinearWriter, execution: Execution
) -> None:
    """Add a writer's output to the stream, in place, as the stock layer would.

    `inputs` are all that it could read, `(windows, tokens, P)`, on any device.

    Raises UserError, naming the writer, if the stream then holds NaN or infinity.
    """
    weight_KP = writer.weight_KP.to(execution.device, execution.dtype)
    bias_K = writer.bias_K
    bias_K = None if bias_K is None else bias_K.to(execution.device, execution.dtype)
    hidden, seen = stream.hidden, FiniteSums()
    for rows, read in _fetched(inputs, execution):
        read = read if writer.kept_P is None else read[..., writer.kept_P]
        written = nn.functional.linear(read, weight_KP, bias_K)
        moved_on = fetch(hidden[rows], execution.device) + written * writer.multiplier
        seen.add(moved_on)
        store(hidden[rows], moved_on, execution.device)
    settle(execution.device)
    seen.check([hidden], writer.name)


def probe_stream(stream: Stream, probe: Probe, execution: Execution) -> None:
    """Show the stream as it stands (after the last layer: what the final norm reads)."""
    for rows, x in _fetched(stream.hidden, execution):
        probe(rows, x)
    settle(execution.device)


class FiniteSums:
    """Whether what a layer gives is finite, looked at where it was computed.

    The sum of a batch is an order of magnitude cheaper than looking at every value, and finite only
    if all are. It stays on the device: what is asked of all batches together is one answer, for
    which the host waits once.
    """

    def __init__(self) -> None:
        self._all_finite: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Take note of a batch."""
        total = batch.sum(dtype=torch.promote_types(batch.dtype, torch.float32))
        finite = torch.isfinite(total)
        before = self._all_finite
        self._all_finite = finite if before is None else finite & before.to(finite.device)

    def check(self, hidden: Sequence[Tensor], where: str) -> None:
        """Look at every value of the streams that the batches went into, if a sum was not finite:
        finite values may have a sum that overflows.

        Raises UserError if one is NaN or infinity; `where` is what it calls the place.
        """
        if self._all_finite is None or self._all_finite.item():
            return
        if not all(torch.isfinite(x).all() for x in hidden):
            raise UserError(
                f"The activations after {where} hold NaN or infinity: try --dtype float32, or an "
                "undamaged copy of the checkpoint."
            )
