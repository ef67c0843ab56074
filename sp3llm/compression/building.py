"""The second streaming pass: build the small model layer by layer beside the dense one.

Dense and small streams run side by side over the calibration text. At each read site the readers
are fitted to turn the small stream into what the dense readers see; at each writer the surviving
inputs are chosen, unless they have been already, and the writer is fitted to bring the small stream
back to the dense one. What has been fitted is rounded to the dtype of the export before the next
fit sees its output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.dense_runs import DenseRuns
from sp3llm.compression.head_fit import TiedTable, suited_head
from sp3llm.compression.merging import merges, read_moment, with_merged_heads
from sp3llm.compression.norms import fit_norm, opened_without_norm
from sp3llm.compression.projecting import (
    gate_and_cut,
    kept_groups,
    prefetch_groups,
    project_and_round,
    renamed,
)
from sp3llm.compression.readers import fit_head, stream_grams
from sp3llm.compression.refitter import (
    DenseLayer,
    FinishedGroup,
    HeadFit,
    LayerFit,
    Refitter,
    overflow_refused,
)
from sp3llm.compression.sequential import (
    fit_first_writers,
    fit_last_writer,
    run_dense,
    token_scales,
)
from sp3llm.compression.task_head import fit_task_head
from sp3llm.compression.units import cut_units
from sp3llm.compression.writers import fit_embeddings, fit_parallel
from sp3llm.models import families
from sp3llm.models.families import Group
from sp3llm.models.opening import open_stream
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.stream import LayeredModel, Stream, run_layer
from sp3llm.text.batches import rows_of
from sp3llm.text.examples import Examples


@dataclass
class _Side:
    """One of the small models that are built beside the dense one."""

    refitter: Refitter
    groups: list[int]
    """Numbers of the dense groups that it keeps."""
    models: list[LayeredModel]
    """Small models whose first 0, 1, ... writers have their inputs cut already."""
    stream: Stream | None = None
    finish: Callable[[], FinishedGroup] | None = None
    """Of the group at hand what waits for the dense stream to stand in front of the next one."""


def refitted_groups(
    refitter: Refitter,
    tokens: Tensor,
    start: int = 0,
    saved: tuple[Tensor, Tensor] | None = None,
    runs: DenseRuns | None = None,
) -> Iterator[FinishedGroup]:
    """Project, choose and refit every group in order, on `tokens`, `(windows, tokens)`, of which
    every process takes its share.

    From group `start` of the small model on, with the dense and small streams as they were `saved`
    before it. What `runs` has of the dense layers is not computed again, and what it has not is
    kept there; None: nothing is.

    Raises UserError where activations or weights of the small model hold NaN or infinity.
    """
    for _, finished in refitted_side_by_side([refitter], tokens, start, saved, runs):
        yield finished


def refitted_side_by_side(
    refitters: Sequence[Refitter],
    tokens: Tensor,
    start: int = 0,
    saved: tuple[Tensor, ...] | None = None,
    runs: DenseRuns | None = None,
) -> Iterator[tuple[int, FinishedGroup]]:
    """`refitted_groups` of several small models beside one dense one, which is read and run once
    for all; each group comes with the number of its model. `saved` are the dense stream and each
    small one.

    Where layers go, the dense stream runs ahead through them, and the last writer before the gap
    chases it behind (docs/design.md 3.14).
    """
    own = [_own_share(refitter, tokens) for refitter in refitters]
    tokens = own[0][1]
    first = own[0][0]
    family, dense, device = first.family, first.dense, first.execution.device
    groups = families.groups(family, dense.config)
    sides = [
        _Side(refitter, kept_groups(groups, refitter.layers), _small_models(refitter))
        for refitter, _ in own
    ]
    dense_model = LayeredModel.of(dense.config, family, first.objective, first.execution)
    summed = None
    if family.post_norm:
        width = Shape.of(family, dense.config).hidden_size
        summed = first.execution.empty_stream((*tokens.shape, width), first.execution.dtype)
    if saved is not None:
        table = dense.read(groups[0].parameters)
        dense_stream = open_stream(dense_model, table, tokens, saved[0])
        for side, hidden in zip(sides, saved[1:], strict=True):
            ((_, projected),) = _projected([side.refitter], groups[0], table)
            side.stream = open_stream(side.models[0], projected, tokens, hidden)
    begin = min(side.groups[start] for side in sides)
    sources = prefetch_groups(dense, family, groups[begin:], device)
    for number, (group, source) in enumerate(sources, begin):
        here = [side for side in sides if number in side.groups]
        with overflow_refused():
            moment = None
            if group.prefix and any(merges(side.refitter) for side in here):
                moment = read_moment(here[0].refitter, dense_stream)
            made = _projected([side.refitter for side in here], group, source, moment)
            if group.name == "embeddings":
                dense_stream = open_stream(dense_model, source, tokens)
                for side, (_, tensors) in zip(here, made, strict=True):
                    side.stream = _embedded(side, tensors, tokens, dense_stream)
                    side.finish = partial(_finished, side, 0, group, tensors, dense_stream)
            elif group.name == "head":
                for side, (_, tensors) in zip(here, made, strict=True):
                    fit = fit_head if family.task_head is None else fit_task_head
                    fit(side.refitter, source, tensors, dense_stream, side.stream)
                    last, suited = len(side.groups) - 1, None
                    if side.refitter.finished is not None:
                        suited = _suit_head(side, tensors, tokens, dense_stream)
                    of_group = (group, tensors, dense_stream, suited)
                    side.finish = partial(_finished, side, last, *of_group)
            else:
                layer = DenseLayer(number - 1, group, source, dense_model, dense_stream, summed)
                _fit_layers(here, layer, made, dense.config, runs)
        for place, side in enumerate(sides):
            if side.finish is not None and number + 1 in (*side.groups, len(groups)):
                with overflow_refused():
                    finished = side.finish()
                side.finish = None
                yield place, finished


def _embedded(
    side: _Side, tensors: dict[str, Tensor], tokens: Tensor | Examples, dense: Stream
) -> Stream:
    """The stream of a small model behind its embeddings, whatever is fitted there fitted."""
    model, refitter = side.models[0], side.refitter
    if refitter.family.post_norm:
        norm = refitter.family.embedding_norm
        stream = open_stream(model, opened_without_norm(norm, tensors), tokens)
        fit_norm(refitter, tensors, norm, dense.hidden, stream, normalised=True)
        return stream
    stream = open_stream(model, tensors, tokens)
    if fit_embeddings(refitter, tensors, tokens, dense, stream):
        stream = open_stream(model, tensors, tokens)
    return stream


def _suit_head(side: _Side, tensors: dict[str, Tensor], tokens: Tensor, dense: Stream) -> HeadFit:
    """Let a fitted head, in place, be suited by what it says; see `head_fit.suited_head`."""
    refitter = side.refitter
    if not refitter.shape.tie_word_embeddings:
        found, changed = suited_head(refitter, tensors, dense, side.stream)
        tensors |= changed
        return found
    name = refitter.family.embedding
    embeddings = families.groups(refitter.family, refitter.dense.config)[0]
    # Of an embedding table that is the head too nothing was fitted.
    source = refitter.dense.read(embeddings.parameters)
    ((_, projected),) = _projected([refitter], embeddings, source)
    tied = TiedTable(projected[name], partial(_stream_with, side, tokens))
    found, changed = suited_head(refitter, tensors, dense, side.stream, tied)
    # A run that was killed here may have judged otherwise, and left its own.
    there = _read_again(refitter, 0)[name].to(tied.table.device)
    if name not in changed and not torch.equal(there, tied.table):
        changed[name] = tied.table
    tensors |= changed
    return found


def _stream_with(side: _Side, tokens: Tensor, table: Tensor) -> Stream:
    """The stream of a small model that is finished but for its head, behind its last layer, on the
    windows that no fit sees, with another embedding table.
    """
    refitter = side.refitter
    family, config = refitter.family, refitter.small_config
    model = LayeredModel.of(config, family, refitter.objective, refitter.execution)
    unseen = rows_of(tokens, slice(refitter.unseen_from, None))
    embeddings = {**_read_again(refitter, 0), family.embedding: table}
    stream = open_stream(model, embeddings, unseen)
    for index in range(len(families.groups(family, config)) - 2):
        run_layer(model, index, _read_again(refitter, index + 1), [(stream, {})])
    return stream


def _read_again(refitter: Refitter, number: int) -> Mapping[str, Tensor]:
    """A group of the small model that is finished, the same on every process."""
    group = families.groups(refitter.family, refitter.small_config)[number]
    ranks, tensors = refitter.execution.ranks, {}
    if ranks.is_first:
        tensors = refitter.finished(number)
        tensors = {name: tensors[name] for name in group.parameters}  # an export may have more
    return ranks.tensors_of_first(tensors)


def _finished(
    side: _Side,
    index: int,
    group: Group,
    tensors: Mapping[str, Tensor],
    dense: Stream,
    head_fit: HeadFit | None = None,
) -> FinishedGroup:
    """A group of a side that nothing is left to fit in."""
    return FinishedGroup(index, group, tensors, dense, side.stream, head_fit)


def _projected(
    refitters: Sequence[Refitter],
    group: Group,
    source: Mapping[str, Tensor],
    moment: Tensor | None = None,
) -> list[tuple[Mapping[str, Tensor], dict[str, Tensor]]]:
    """For each of several small models a group with its attention cut, in old coordinates, and
    projected and rounded: once for all that share their projection, as shapes of one width do, and
    the heads that they merge by the `moment` of `merging.read_moment`.
    """
    found: dict[Any, tuple[Mapping[str, Tensor], dict[str, Tensor]]] = {}
    made = []
    for refitter in refitters:
        family, projection, device = refitter.family, refitter.projection, refitter.execution.device
        merged = moment is not None and merges(refitter) and refitter.shape.num_key_value_heads
        key = id(projection), refitter.dtype, merged
        if key not in found:
            whole = with_merged_heads(refitter, group, source, moment) if merged else source
            cut = gate_and_cut(family, projection, device, group, whole)
            tensors = project_and_round(family, projection, refitter.dtype, device, group, cut)
            found[key] = cut, tensors
        cut, tensors = found[key]
        # Each has a dictionary of its own, where fitted tensors take the place of these.
        made.append(
            (_of_kept_neurons(refitter, group, cut), _of_kept_neurons(refitter, group, tensors))
        )
    return made


def _of_kept_neurons(
    refitter: Refitter, group: Group, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A layer's tensors with the FFN neurons alone that stay, where that is known before it is
    fitted.
    """
    if refitter.neurons_LF is None or not group.prefix or group.sparse:
        return dict(tensors)
    kept_U = refitter.neurons_LF[group.layer].nonzero()[:, 0]
    sizes = families.axis_sizes(refitter.family, refitter.dense.config)
    return cut_units(group, tensors, kept_U, {families.FFN: 1}, sizes)


def _own_share(refitter: Refitter, tokens: Tensor) -> tuple[Refitter, Tensor]:
    """The refitter with the bounds of held-back and unseen windows counted among this process's
    windows, and how much text all processes have, and these windows.
    """
    local_windows = refitter.execution.local_windows(*tokens.shape)
    text_tokens = 0 if isinstance(tokens, Examples) else refitter.unseen_from * tokens.shape[1]
    held_from = int((local_windows < refitter.held_from).sum())
    unseen_from = int((local_windows < refitter.unseen_from).sum())
    of_share = {"held_from": held_from, "unseen_from": unseen_from, "text_tokens": text_tokens}
    refitter = replace(refitter, **of_share)
    return refitter, rows_of(tokens, local_windows)


def _small_models(refitter: Refitter) -> list[LayeredModel]:
    """Small models whose first 0, 1, ... writers have their inputs cut already."""
    family, dense, shape = refitter.family, refitter.dense.config, refitter.shape
    whole = Shape.of(family, dense)
    start = shape
    if refitter.neurons_LF is None:
        start = replace(shape, intermediate_size=whole.intermediate_size)
    # Else attention is cut before anything else.
    if not (families.is_square(family, dense) or merges(refitter)):
        start = start.with_axis_of(whole, families.QUERY)
    steps = [start]
    for writer in family.writers:
        axis = family.layer[f"{writer}.weight"][1]
        steps.append(steps[-1].with_axis_of(shape, axis))
    configs = [resized_config(family, dense, step, refitter.layers) for step in steps]
    objective, execution = refitter.objective, refitter.execution
    return [LayeredModel.of(config, family, objective, execution) for config in configs]


def _fit_layers(
    sides: Sequence[_Side],
    dense: DenseLayer,
    made: Sequence[tuple[Mapping[str, Tensor], dict[str, Tensor]]],
    config: Mapping[str, Any],
    runs: DenseRuns | None,
) -> None:
    """Send the dense stream through a layer, once for all, and fit it, `made` for each of the small
    models that keep it, but for what chases the dense stream in front of their next one. `config`
    is the dense model's; for `runs` see `sequential.run_dense`.

    Before the dense layer runs, the sites in front of which the streams stand are looked at.
    """
    layers, first_grams = [], []
    for side, (cut, tensors) in zip(sides, made, strict=True):
        index = side.groups.index(dense.index + 1) - 1
        small = families.renumbered(side.refitter.family, dense.group, index)
        own = (renamed(cut, dense.group, small), renamed(tensors, dense.group, small))
        layers.append(LayerFit(dense, small, *own, side.models, side.stream))
        first_grams.append(stream_grams(side.refitter, dense.stream.hidden, side.stream))
    fits = list(zip(sides, layers, first_grams, strict=True))
    run = run_dense(dense, config, runs, is_chased=bool(sides))
    if families.is_parallel(dense.model.family, config):
        for side, layer, grams in fits:
            rest = partial(fit_parallel, side.refitter, layer, grams)
            side.finish = partial(_finish_layer, side, layer, rest)
        return
    for side, layer, grams in fits:
        fit_first_writers(side.refitter, layer, grams, run)
        scales = None
        if dense.summed is not None and dense.index + 2 not in side.groups:
            scales = token_scales(side.refitter, dense.summed)
        rest = partial(fit_last_writer, side.refitter, layer, run.counts, scales)
        side.finish = partial(_finish_layer, side, layer, rest)


def _finish_layer(side: _Side, layer: LayerFit, fit_rest: Callable[[], None]) -> FinishedGroup:
    """Fit the rest of a side's layer."""
    fit_rest()
    return _finished(side, layer.index + 1, layer.group, layer.tensors, layer.dense.stream)
