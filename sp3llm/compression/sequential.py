"""Fit a layer whose blocks come one after the other: attention, then the FFN."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.dense_runs import (
    DenseRun,
    DenseRuns,
    keeper,
    layer_again,
    recorded,
)
from sp3llm.compression.norms import fit_norm
from sp3llm.compression.readers import fit_readers, stream_grams
from sp3llm.compression.refitter import DenseLayer, LayerFit, Refitter
from sp3llm.compression.writers import fit_writer
from sp3llm.maths.moments import root_mean_square
from sp3llm.maths.refit import Gram
from sp3llm.models.families import Family
from sp3llm.models.hooks import ValueCounts, both_probes
from sp3llm.models.stream import LayerPart, LinearWriter, add_to_stream, run_layer


def fit_first_writers(
    refitter: Refitter, layer: LayerFit, grams: tuple[Gram, Gram], dense: DenseRun
) -> None:
    """Fit the readers of one layer, and all writers but the last, one block after the other.

    The small stream moves on by each fitted writer's own output; of the blocks behind it nothing
    runs again, and what is before it is silent. `grams` are those of the first site.
    """
    small_stream = layer.small_stream
    for number, site in enumerate(layer.group.sites):
        if number:
            grams = stream_grams(refitter, dense.behind[number - 1], small_stream)
        fit_readers(refitter, layer, site, grams)
        if number < len(dense.behind):
            front = _silent_front(refitter.family, layer, number, dense.counts)
            target = dense.summed[number]
            inputs, kept_P = fit_writer(refitter, layer, number, target, front, True)
            writer = _linear_writer(refitter, layer, number, kept_P)
            add_to_stream(small_stream, inputs, writer, refitter.execution)
            _through_norm(refitter, layer, number, dense.behind[number])


def fit_last_writer(
    refitter: Refitter, layer: LayerFit, counts: ValueCounts, scales: Tensor | None = None
) -> None:
    """Fit the last writer of a layer to the dense stream as it stands, and send the small stream
    through it.

    Experts' writers, each of which sees some tokens only, stay projected. `scales`, `(windows,
    tokens, 1)`, is what the norm of a post-norm layer that layers behind it go with has read, as
    `token_scales` gives it: what the last of these reads is chased at that scale, which the norm
    takes from it anyway.
    """
    family, small_stream, number = refitter.family, layer.small_stream, len(layer.group.sites) - 1
    front = _silent_front(family, layer, number, counts)
    summed = layer.dense.stream.hidden if layer.dense.summed is None else layer.dense.summed
    if not layer.group.sparse:
        keeps = refitter.execution.keeps_inputs
        inputs, kept_P = fit_writer(refitter, layer, number, summed, front, keeps, scales)
        if keeps:
            writer = _linear_writer(refitter, layer, number, kept_P)
            add_to_stream(small_stream, inputs, writer, refitter.execution)
            _through_norm(refitter, layer, number, layer.dense.stream.hidden)
            return
    # The last writer's inputs are the widest of all: running its block again costs less memory.
    model, probes, part = layer.small_models[-1], {}, front
    if family.post_norm:
        norm = family.sites[number].norm
        probes = {norm: keeper(small_stream.hidden, refitter.execution)}
        part = replace(front, stop_before=norm)
    run_layer(model, layer.index, layer.tensors, [(small_stream, probes)], part)
    _through_norm(refitter, layer, number, layer.dense.stream.hidden)


def token_scales(refitter: Refitter, summed: Tensor) -> Tensor:
    """Root mean square over channels of each token of a dense stream in front of a norm, where
    streams are; `(windows, tokens, 1)`.
    """
    scales = torch.empty_like(summed[..., :1])
    for row, x in enumerate(summed):
        scales[row] = root_mean_square(x, refitter.family.centred).to(scales)
    return scales


def _through_norm(refitter: Refitter, layer: LayerFit, number: int, behind: Tensor) -> None:
    """In a post-norm family fit the norm behind a writer, and send the small stream through it."""
    if refitter.family.post_norm:
        norm = layer.name(layer.group.sites[number].norm)
        fit_norm(refitter, layer.tensors, norm, behind, layer.small_stream)


def _silent_front(family: Family, layer: LayerFit, number: int, counts: ValueCounts) -> LayerPart:
    """The layer without the blocks in front of a site, whose output is in the small stream."""
    done = layer.group.sites[:number]
    zeroed = {site.block: counts[site.block] for site in done}
    if not family.post_norm:
        return LayerPart(zeroed=zeroed)
    # A writer's bias is in the stream too, and the norm has been gone through.
    writers = dict.fromkeys(layer.group.writers[:number])
    return LayerPart(zeroed={**writers, **zeroed}, handing_on=tuple(site.norm for site in done))


def _linear_writer(
    refitter: Refitter, layer: LayerFit, number: int, kept_P: Tensor | None
) -> LinearWriter:
    """A layer's fitted writer, which reads those at `kept_P` of its inputs; None: all."""
    name = layer.name(refitter.family.writers[number])
    weight_KP, bias_K = layer.tensors[f"{name}.weight"], layer.tensors.get(f"{name}.bias")
    return LinearWriter(f"the small {name}", weight_KP, bias_K, kept_P, refitter.multiplier)


def run_dense(
    dense: DenseLayer, config: Mapping[str, Any], runs: DenseRuns | None, is_chased: bool
) -> DenseRun:
    """Send the dense stream through its layer, in the model of that config, and say what the layer
    leaves, if any small model chases it. What `runs` has of it is not computed again; what it has
    not goes there, unless there is None.
    """
    model, index, stream = dense.model, dense.index, dense.stream
    if runs is not None and index in runs:
        layer_again(runs[index], stream.hidden, dense.summed)
        return runs[index]
    with recorded(model, config, index, stream, runs is not None, is_chased) as (run, probes):
        if dense.summed is not None:
            norm = {model.family.sites[-1].norm: keeper(dense.summed, model.execution)}
            probes = both_probes(probes, norm)
        run_layer(model, index, dense.source, [(stream, probes)])
    if runs is not None:
        runs[index] = run
    return run
