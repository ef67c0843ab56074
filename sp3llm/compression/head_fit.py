"""What a fitted head is given by what it says: a step of its matrix and a factor in its norm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp3llm.compression.ends import (
    dense_end,
    divergences,
    mean_of_all,
    on_windows,
    small_end,
)
from sp3llm.compression.head_step import stepped
from sp3llm.compression.logit_scale import fit_logit_scale, scaled_norm
from sp3llm.compression.refitter import HeadFit, Refitter
from sp3llm.models.stream import Stream

# What a step must win, nats a token: less is rounding, as where nothing was lost;
_LEAST_GAIN = 1e-5
# and in standard errors of that: of few tokens the half has won something by chance.
_SURE_ENOUGH = 2.0


@dataclass(frozen=True)
class TiedTable:
    """Embeddings that are the head too."""

    table: Tensor
    stream_with: Callable[[Tensor], Stream]
    """The small model's stream behind its last layer, on this process's windows that no fit saw,
    with another table: what changes the head changes what every token enters with."""


def suited_head(
    refitter: Refitter,
    tensors: Mapping[str, Tensor],
    dense_stream: Stream,
    small_stream: Stream,
    tied: TiedTable | None = None,
) -> tuple[HeadFit, dict[str, Tensor]]:
    """Bring what a head says nearer to what the dense model does, on the windows from
    `refitter.unseen_from` on: what it was given, and the tensors that have changed.

    `tensors` are the small head's group, `tied` the small model's embeddings where they are its
    head too, which then are among those that change, and the whole model, as it is written, is
    judged. The streams, `(windows, tokens, width)`, stand behind the last layers. The same on every
    process.
    """
    name = f"{refitter.family.head}.weight"
    small = small_end(refitter, tensors, None if tied is None else tied.table, small_stream)
    dense = dense_end(refitter, dense_stream)
    unseen = slice(refitter.unseen_from, None)
    told_by, before = on_windows(dense, unseen), on_windows(small, unseen)
    step = stepped(refitter, small, dense)
    table = step.head[name]
    ends, changed = [before], {}
    if torch.isfinite(table).all():
        after = on_windows(step, unseen)
        if tied is not None:
            after = replace(after, stream=tied.stream_with(table))
        ends.append(after)
    found = divergences(refitter, ends, told_by)
    divergence, _ = mean_of_all(refitter, found[0])
    gain, error = mean_of_all(refitter, found[0] - found[-1])
    if gain > max(_LEAST_GAIN, _SURE_ENOUGH * error):
        before, divergence = ends[-1], divergence - gain
        changed[name if tied is None else refitter.family.embedding] = table
    else:
        gain = 0.0
    scale = fit_logit_scale(refitter, before, told_by, divergence)
    return HeadFit(scale, gain), {**changed, **scaled_norm(refitter, tensors, scale)}
