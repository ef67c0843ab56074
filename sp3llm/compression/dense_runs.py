"""What the dense model's layers leave behind for small ones to chase, and what is kept of it.

The first pass sends the calibration windows through every layer of the dense model; the refit, and
every round of trials, would do it again. Where memory has room, what a layer leaves is kept the
first time (`runtime.devices.Execution.keeps_dense`), and copied from then on: the same numbers,
since windows go through a layer in the same batches.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sp3llm.compression.reading import read_at
from sp3llm.models import families
from sp3llm.models.hooks import Probe, ValueCounts, value_counts
from sp3llm.models.stream import OUTPUT, LayeredModel, Stream
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.transfer import store


@dataclass(frozen=True)
class DenseRun:
    """What a run of a dense layer leaves behind, for the small ones to chase."""

    behind: list[Tensor]
    """The stream behind each writer but the last, `(windows, tokens, D)`; none where blocks read
    the same stream."""
    summed: list[Tensor]
    """In a post-norm family the stream with what each of these writers has added, in front of the
    norm; in others the same as `behind`."""
    counts: ValueCounts
    """How many values each block returns."""
    output: Tensor | None = None
    """The stream behind the layer, where it is kept."""
    last_summed: Tensor | None = None
    """In a post-norm family what the last norm reads, where that is kept."""


DenseRuns = dict[int, DenseRun]
"""What is kept, by number of the layer, of this process's windows."""


@contextmanager
def recorded(
    model: LayeredModel,
    config: Mapping[str, Any],
    index: int,
    stream: Stream,
    keeps: bool,
    is_chased: bool = True,
) -> Iterator[tuple[DenseRun, dict[str, Probe]]]:
    """What layer `index` of the dense model, of that config, leaves of `stream`, filled while it
    runs in the block with the probes that come with it; with `keeps` all that `layer_again` needs.
    Where no model chases the layer, and nothing is kept, it leaves nothing.
    """
    family, execution, hidden = model.family, model.execution, stream.hidden

    def places(count: int) -> list[Tensor]:
        shape = tuple(hidden.shape)
        return [execution.empty_stream(shape, hidden.dtype) for _ in range(count)]

    in_turn = (keeps or is_chased) and not families.is_parallel(family, config)
    between = family.sites[1:] if in_turn else ()
    behind = places(len(between))
    summed = places(len(between)) if family.post_norm else behind
    at = {read_at(family, site): place for site, place in zip(between, behind, strict=True)}
    if family.post_norm:
        norms = [site.norm for site in family.sites[: len(summed)]]
        at |= dict(zip(norms, summed, strict=True))
    output = last_summed = None
    if keeps:
        (output,) = places(1)
        at[OUTPUT] = output
        if family.post_norm:
            (last_summed,) = places(1)
            at[family.sites[-1].norm] = last_summed
    probes = {name: keeper(place, execution) for name, place in at.items()}
    with value_counts(model.layer(index), [site.block for site in family.sites]) as counts:
        yield DenseRun(behind, summed, counts, output, last_summed), probes


def layer_again(run: DenseRun, hidden: Tensor, summed: Tensor | None) -> None:
    """Put the stream behind a layer that was kept in the place of that in front of it, and what its
    last norm reads in `summed`, if there is such a place.
    """
    hidden.copy_(run.output)
    if summed is not None:
        summed.copy_(run.last_summed)


def keeper(place: Tensor, execution: Execution) -> Probe:
    """A probe that keeps what it sees."""

    def keep(rows: slice, x: Tensor) -> None:
        store(place[rows], x, execution.device)

    return keep
