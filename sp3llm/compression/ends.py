"""Both models of a refit behind their last layers, where what they say can be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.refitter import Refitter
from sp3llm.models.checkpoint import head_tensors
from sp3llm.models.head import End
from sp3llm.models.stream import LayeredModel, Stream


def small_end(
    refitter: Refitter, head: Mapping[str, Tensor], table: Tensor | None, stream: Stream
) -> End:
    """The small model, from its head's group; `table` are its embeddings, which are its head too
    where these are tied.
    """
    if refitter.shape.tie_word_embeddings:
        head = {**head, f"{refitter.family.head}.weight": table}
    return _end(refitter, refitter.small_config, head, stream)


def dense_end(refitter: Refitter, stream: Stream) -> End:
    """The dense model."""
    head = head_tensors(refitter.dense, refitter.family)
    return _end(refitter, refitter.dense.config, head, stream)


def with_head(refitter: Refitter, small: End, changed: Mapping[str, Tensor]) -> End:
    """The small model with other tensors of its head's group, in a module of its own: side by side
    two cannot stand in one.
    """
    return _end(refitter, refitter.small_config, {**small.head, **changed}, small.stream)


def on_windows(end: End, windows: Tensor | slice) -> End:
    """The same on some of the windows of its stream."""
    stream = end.stream
    real = None if stream.real is None else stream.real[windows]
    return replace(end, stream=replace(stream, hidden=stream.hidden[windows], real=real))


def on_tokens(end: End, places: slice) -> End:
    """The same on some of the tokens of every window, of rows without padding."""
    return replace(end, stream=replace(end.stream, hidden=end.stream.hidden[:, places]))


def divergences(refitter: Refitter, smalls: Sequence[End], dense: End) -> list[Tensor]:
    """How far each of several small models is from the dense one, which is asked once for all, at
    every token of this process's windows that the ends are of, nats, float64; none where a process
    has none of them.
    """
    if not len(dense.stream.hidden):
        return [torch.zeros(0, dtype=torch.float64) for _ in smalls]
    return refitter.objective.divergences(smalls, dense)


def mean_divergences(refitter: Refitter, smalls: Sequence[End], dense: End) -> list[float]:
    """The means of `divergences` over the tokens of all processes, the same on every one."""
    found = divergences(refitter, smalls, dense)
    return [mean_of_all(refitter, of_one)[0] for of_one in found]


def mean_of_all(refitter: Refitter, values: Tensor) -> tuple[float, float]:
    """The mean over the values, float64, of all processes, and its standard error, as of values
    that hang on nothing but chance; NaN of fewer than two. The same on every process.
    """
    sums = torch.tensor([values.numel(), values.sum(), values.square().sum()], dtype=torch.float64)
    refitter.execution.ranks.all_reduce_(sums)
    count, total, squares = sums
    mean = total / count
    error = ((squares / count - mean**2).clamp_min(0) / (count - 1)).sqrt()
    return mean.item(), error.item()


def _end(
    refitter: Refitter, config: Mapping[str, Any], head: Mapping[str, Tensor], stream: Stream
) -> End:
    model = LayeredModel.of(config, refitter.family, refitter.objective, refitter.execution)
    return End(model, head, stream)
