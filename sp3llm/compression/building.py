"""The second streaming pass: build the small model layer by layer beside the dense one.

Dense and small streams run side by side over the calibration text. At each read site the readers
are fitted to turn the small stream into what the dense readers see; at each writer the surviving
inputs are chosen and the writer is fitted to bring the small stream back to the dense one. What
has been fitted is rounded to the dtype of the export before the next fit sees its output.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sp3llm.compression.projecting import gate_and_cut, prefetch_groups, project_and_round
from sp3llm.compression.readers import fit_head, fit_readers, stream_grams
from sp3llm.compression.refitter import FinishedGroup, LayerFit, Refitter, overflow_refused
from sp3llm.compression.writers import fit_embeddings, fit_parallel, fit_writer
from sp3llm.models import families
from sp3llm.models.hooks import ValueCounts, value_counts
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.stream import (
    LayeredModel,
    LayerPart,
    LinearWriter,
    Stream,
    add_to_stream,
    open_stream,
    run_layer,
)


def refitted_groups(
    refitter: Refitter,
    tokens: Tensor,
    start: int = 0,
    saved: tuple[Tensor, Tensor] | None = None,
) -> Iterator[FinishedGroup]:
    """Project, choose and refit every group in order, on `tokens`, `(windows, tokens)`, of which
    every process takes its share.

    From group `start` on, with the dense and small streams as they were `saved` before it.

    Raises UserError where activations or weights of the small model hold NaN or infinity.
    """
    refitter, tokens = _own_share(refitter, tokens)
    family, dense, device = refitter.family, refitter.dense, refitter.execution.device
    projection, dtype = refitter.projection, refitter.dtype
    groups = families.groups(family, dense.config)
    small_models = _small_models(refitter)
    dense_model = LayeredModel.of(dense.config, family, refitter.objective, refitter.execution)
    if saved is not None:
        table = dense.read(groups[0].parameters)
        dense_stream = open_stream(dense_model, table, tokens, saved[0])
        projected = project_and_round(family, projection, dtype, device, groups[0], table)
        small_stream = open_stream(small_models[0], projected, tokens, saved[1])
    sources = prefetch_groups(dense, family, groups[start:], device)
    for index, (group, source) in enumerate(sources, start):
        cut = gate_and_cut(family, projection, device, group, source)
        tensors = project_and_round(family, projection, dtype, device, group, cut)
        with overflow_refused():
            if group.name == "embeddings":
                dense_stream = open_stream(dense_model, source, tokens)
                small_stream = open_stream(small_models[0], tensors, tokens)
                if fit_embeddings(refitter, tensors, tokens, dense_stream, small_stream):
                    small_stream = open_stream(small_models[0], tensors, tokens)
            elif group.name == "head":
                fit_head(refitter, source, tensors, dense_stream, small_stream)
            else:
                models, streams = (dense_model, small_models), (dense_stream, small_stream)
                layer = LayerFit(index - 1, group, source, cut, tensors, *models, *streams)
                _fit_layer(refitter, layer)
        yield FinishedGroup(index, group, tensors, dense_stream, small_stream)


def _own_share(refitter: Refitter, tokens: Tensor) -> tuple[Refitter, Tensor]:
    """The refitter with the bounds of held-back and unseen windows counted among this process's
    windows, and these.
    """
    local_windows = refitter.execution.local_windows(*tokens.shape)
    held_from = int((local_windows < refitter.held_from).sum())
    unseen_from = int((local_windows < refitter.unseen_from).sum())
    refitter = replace(refitter, held_from=held_from, unseen_from=unseen_from)
    return refitter, tokens[local_windows]


def trial_loss(refitter: Refitter, tokens: Tensor) -> float:
    """Mean loss, in nats a token, of a refitted model on the windows no fit saw.

    Nothing is written: the small stream goes through each layer as it is fitted.
    """
    family, config, execution = refitter.family, refitter.dense.config, refitter.execution
    small_config = resized_config(family, config, refitter.shape)
    for finished in refitted_groups(refitter, tokens):
        if finished.group.name == "embeddings":
            table = finished.tensors[family.embedding]
    head, stream = finished.tensors, finished.small
    if refitter.shape.tie_word_embeddings:
        head = {**head, f"{family.head}.weight": table}
    local_windows = execution.local_windows(*tokens.shape)
    unseen = local_windows >= refitter.unseen_from
    ends = Stream(stream.hidden[unseen], stream.calls)
    model = LayeredModel.of(small_config, family, refitter.objective, execution)
    losses = refitter.objective.losses(model, head, ends, tokens[local_windows[unseen]])
    total = torch.tensor([losses.sum(), losses.numel()], dtype=torch.float64)
    execution.ranks.all_reduce_(total)
    return (total[0] / total[1]).item()


def _small_models(refitter: Refitter) -> list[LayeredModel]:
    """Small models whose first 0, 1, ... writers have their inputs cut already."""
    family, dense, shape = refitter.family, refitter.dense.config, refitter.shape
    whole = Shape.of(family, dense)
    start = replace(shape, intermediate_size=whole.intermediate_size)
    if not families.is_square(family, dense):  # else attention is cut before anything else
        start = start.with_axis_of(whole, families.QUERY)
    steps = [start]
    for writer in family.writers:
        axis = family.layer[f"{writer}.weight"][1]
        steps.append(steps[-1].with_axis_of(shape, axis))
    configs = [resized_config(family, dense, step) for step in steps]
    objective, execution = refitter.objective, refitter.execution
    return [LayeredModel.of(config, family, objective, execution) for config in configs]


def _fit_layer(refitter: Refitter, layer: LayerFit) -> None:
    """Fit one layer, its tensors in place, and send both streams through it.

    The small stream moves on by each fitted writer's own output; of the blocks behind it nothing
    runs again, and what is before it is silent. Experts' writers, each of which sees some tokens
    only, stay projected: of a block of experts the readers are fitted, the router among them.
    """
    if families.is_parallel(refitter.family, refitter.dense.config):
        fit_parallel(refitter, layer)
        return
    group, small_stream = layer.group, layer.small_stream
    grams = stream_grams(refitter, layer.dense_stream.hidden, small_stream)
    targets, counts = _run_dense(refitter, layer)
    last = len(group.sites) - 1
    for number, site in enumerate(group.sites):
        if number:
            grams = stream_grams(refitter, targets[number - 1], small_stream)
        fit_readers(refitter, layer, site, grams)
        zeroed = {done.block: counts[done.block] for done in group.sites[:number]}
        if group.sparse and number == last:
            break
        target, keep_inputs = targets[number], number < last
        inputs, kept_P = fit_writer(refitter, layer, number, target, zeroed, keep_inputs)
        if keep_inputs:
            writer = _linear_writer(refitter, layer, number, kept_P)
            add_to_stream(small_stream, inputs, writer, refitter.execution)
    # The last writer's inputs are the widest of all: running its block again costs less memory.
    part = LayerPart(zeroed=zeroed)
    run_layer(layer.small_models[-1], layer.index, layer.tensors, [(small_stream, {})], part)


def _linear_writer(
    refitter: Refitter, layer: LayerFit, number: int, kept_P: Tensor | None
) -> LinearWriter:
    """A layer's fitted writer, which reads those at `kept_P` of its inputs; None: all."""
    name = layer.name(refitter.family.writers[number])
    weight_KP, bias_K = layer.tensors[f"{name}.weight"], layer.tensors.get(f"{name}.bias")
    return LinearWriter(f"the small {name}", weight_KP, bias_K, kept_P, refitter.multiplier)


def _run_dense(refitter: Refitter, layer: LayerFit) -> tuple[list[Tensor], ValueCounts]:
    """Run the dense layer.

    Returns the stream after each of its writers, and how many values each of its blocks returns.
    """
    family, hidden = refitter.family, layer.dense_stream.hidden
    between = [
        refitter.execution.empty_stream(tuple(hidden.shape), hidden.dtype) for _ in family.sites[1:]
    ]
    probes = {}
    for site, store in zip(family.sites[1:], between, strict=True):

        def keep(rows: slice, x: Tensor, store: Tensor = store) -> None:
            store[rows] = x.to(store.device)

        probes[site.norm] = keep
    blocks = [site.block for site in family.sites]
    with value_counts(layer.dense_model.layer(layer.index), blocks) as counts:
        run_layer(layer.dense_model, layer.index, layer.source, [(layer.dense_stream, probes)])
    return [*between, hidden], counts
