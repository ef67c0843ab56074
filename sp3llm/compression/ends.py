"""Both models of a refit behind their last layers, where what they say can be compared."""

from collections.abc import Mapping
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


def on_windows(end: End, windows: Tensor | slice) -> End:
    """The same on some of the windows of its stream."""
    stream = end.stream
    real = None if stream.real is None else stream.real[windows]
    return replace(end, stream=replace(stream, hidden=stream.hidden[windows], real=real))


def on_tokens(end: End, places: slice) -> End:
    """The same on some of the tokens of every window, of rows without padding."""
    return replace(end, stream=replace(end.stream, hidden=end.stream.hidden[:, places]))


def mean_divergence(refitter: Refitter, small: End, dense: End) -> float:
    """How far the small model is from the dense one, nats, in the mean over the tokens of all
    processes' windows that the ends are of. The same on every process.
    """
    total = torch.zeros(2, dtype=torch.float64)
    if len(small.stream.hidden):  # a process may have none of them
        found = refitter.objective.divergences(small, dense)
        total = torch.tensor([found.sum(), found.numel()], dtype=torch.float64)
    refitter.execution.ranks.all_reduce_(total)
    return (total[0] / total[1]).item()


def _end(
    refitter: Refitter, config: Mapping[str, Any], head: Mapping[str, Tensor], stream: Stream
) -> End:
    model = LayeredModel.of(config, refitter.family, refitter.objective, refitter.execution)
    return End(model, head, stream)
