"""The second streaming pass: build the small model layer by layer beside the dense one.

Dense and small streams run side by side over the calibration text. At each read site the readers
are fitted to turn the small stream into what the dense readers see; at each writer the surviving
inputs are chosen and the writer is fitted to bring the small stream back to the dense one. What
has been fitted is rounded to the dtype of the export before the next fit sees its output.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.projecting import gate_and_cut, prefetch_groups, project_and_round
from sp3llm.compression.readers import fit_head, fit_readers, stream_grams
from sp3llm.compression.refitter import (
    DenseLayer,
    FinishedGroup,
    LayerFit,
    Refitter,
    overflow_refused,
)
from sp3llm.compression.writers import fit_embeddings, fit_parallel, fit_writer
from sp3llm.maths.refit import Gram
from sp3llm.models import families
from sp3llm.models.checkpoint import head_tensors
from sp3llm.models.families import Group
from sp3llm.models.head import End
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
from sp3llm.runtime.transfer import store


@dataclass
class _Side:
    """One of the small models that are built beside the dense one."""

    refitter: Refitter
    models: list[LayeredModel]
    """Small models whose first 0, 1, ... writers have their inputs cut already."""
    stream: Stream | None = None


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
    for (finished,) in refitted_side_by_side([refitter], tokens, start, saved):
        yield finished


def refitted_side_by_side(
    refitters: Sequence[Refitter],
    tokens: Tensor,
    start: int = 0,
    saved: tuple[Tensor, ...] | None = None,
) -> Iterator[list[FinishedGroup]]:
    """`refitted_groups` of several small models beside one dense one, which is read and run once
    for all; `saved` are the dense stream and each small one.
    """
    own = [_own_share(refitter, tokens) for refitter in refitters]
    tokens = own[0][1]
    sides = [_Side(refitter, _small_models(refitter)) for refitter, _ in own]
    first = sides[0].refitter
    family, dense, device = first.family, first.dense, first.execution.device
    groups = families.groups(family, dense.config)
    dense_model = LayeredModel.of(dense.config, family, first.objective, first.execution)
    if saved is not None:
        table = dense.read(groups[0].parameters)
        dense_stream = open_stream(dense_model, table, tokens, saved[0])
        for side, hidden in zip(sides, saved[1:], strict=True):
            ((_, projected),) = _projected([side.refitter], groups[0], table)
            side.stream = open_stream(side.models[0], projected, tokens, hidden)
    for index, (group, source) in enumerate(
        prefetch_groups(dense, family, groups[start:], device), start
    ):
        made = _projected([side.refitter for side in sides], group, source)
        with overflow_refused():
            if group.name == "embeddings":
                dense_stream = open_stream(dense_model, source, tokens)
                for side, (_, tensors) in zip(sides, made, strict=True):
                    side.stream = open_stream(side.models[0], tensors, tokens)
                    pair = (dense_stream, side.stream)
                    if fit_embeddings(side.refitter, tensors, tokens, *pair):
                        side.stream = open_stream(side.models[0], tensors, tokens)
            elif group.name == "head":
                for side, (_, tensors) in zip(sides, made, strict=True):
                    fit_head(side.refitter, source, tensors, dense_stream, side.stream)
            else:
                dense_layer = DenseLayer(index - 1, group, source, dense_model, dense_stream)
                layers = [
                    LayerFit(dense_layer, cut, tensors, side.models, side.stream)
                    for side, (cut, tensors) in zip(sides, made, strict=True)
                ]
                _fit_layers([side.refitter for side in sides], layers)
        yield [
            FinishedGroup(index, group, tensors, dense_stream, side.stream)
            for side, (_, tensors) in zip(sides, made, strict=True)
        ]


def _projected(
    refitters: Sequence[Refitter], group: Group, source: Mapping[str, Tensor]
) -> list[tuple[Mapping[str, Tensor], dict[str, Tensor]]]:
    """For each of several small models a group with its attention cut, in old coordinates, and
    projected and rounded: once for all that share their projection, as shapes of one width do.
    """
    found: dict[tuple[int, torch.dtype], tuple[Mapping[str, Tensor], dict[str, Tensor]]] = {}
    for refitter in refitters:
        family, projection, device = refitter.family, refitter.projection, refitter.execution.device
        if (id(projection), refitter.dtype) not in found:
            cut = gate_and_cut(family, projection, device, group, source)
            tensors = project_and_round(family, projection, refitter.dtype, device, group, cut)
            found[id(projection), refitter.dtype] = cut, tensors
    # Each has a dictionary of its own, where fitted tensors take the place of these.
    shared = [found[id(refitter.projection), refitter.dtype] for refitter in refitters]
    return [(cut, dict(tensors)) for cut, tensors in shared]


def _own_share(refitter: Refitter, tokens: Tensor) -> tuple[Refitter, Tensor]:
    """The refitter with the bounds of held-back and unseen windows counted among this process's
    windows, and these.
    """
    local_windows = refitter.execution.local_windows(*tokens.shape)
    held_from = int((local_windows < refitter.held_from).sum())
    unseen_from = int((local_windows < refitter.unseen_from).sum())
    refitter = replace(refitter, held_from=held_from, unseen_from=unseen_from)
    return refitter, tokens[local_windows]


def trial_losses(refitters: Sequence[Refitter], tokens: Tensor) -> list[float]:
    """How far each of several refitted models is from the dense one, on the windows no fit saw: the
    mean divergence of what it predicts from what the dense model does, in nats a token.

    That is what a loss on text grows by where the dense model is right about text, and varies much
    less from text to text. Nothing is written: streams go through each layer as it is fitted.
    """
    first = refitters[0]
    family, config, execution = first.family, first.dense.config, first.execution
    for finished in refitted_side_by_side(refitters, tokens):
        if finished[0].group.name == "embeddings":
            tables = [one.tensors[family.embedding] for one in finished]
    local_windows = execution.local_windows(*tokens.shape)
    unseen = local_windows >= first.unseen_from

    def end_of(model_config: Mapping[str, Any], head: Mapping[str, Tensor], stream: Stream) -> End:
        model = LayeredModel.of(model_config, family, first.objective, execution)
        return End(model, head, Stream(stream.hidden[unseen], stream.calls))

    dense = end_of(config, head_tensors(first.dense, family), finished[0].dense)
    losses = []
    for refitter, one, table in zip(refitters, finished, tables, strict=True):
        head = one.tensors
        if refitter.shape.tie_word_embeddings:
            head = {**head, f"{family.head}.weight": table}
        small = end_of(resized_config(family, config, refitter.shape), head, one.small)
        found = first.objective.divergences(small, dense)
        total = torch.tensor([found.sum(), found.numel()], dtype=torch.float64)
        execution.ranks.all_reduce_(total)
        losses.append((total[0] / total[1]).item())
    return losses


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


def _fit_layers(refitters: Sequence[Refitter], layers: Sequence[LayerFit]) -> None:
    """Fit one layer of every small model, their tensors in place, and send all streams through it.

    The dense layer runs once. Before it does, the sites in front of which the streams stand are
    looked at.
    """
    dense = layers[0].dense
    pairs = list(zip(refitters, layers, strict=True))
    first_grams = [
        stream_grams(refitter, dense.stream.hidden, layer.small_stream) for refitter, layer in pairs
    ]
    if families.is_parallel(refitters[0].family, refitters[0].dense.config):
        run_layer(dense.model, dense.index, dense.source, [(dense.stream, {})])
        for (refitter, layer), grams in zip(pairs, first_grams, strict=True):
            fit_parallel(refitter, layer, grams)
        return
    targets, counts = _run_dense(refitters[0], dense)
    for (refitter, layer), grams in zip(pairs, first_grams, strict=True):
        _fit_in_turn(refitter, layer, grams, targets, counts)


def _fit_in_turn(
    refitter: Refitter,
    layer: LayerFit,
    grams: tuple[Gram, Gram],
    targets: list[Tensor],
    counts: ValueCounts,
) -> None:
    """Fit the readers and writers of one layer, one block after the other.

    The small stream moves on by each fitted writer's own output; of the blocks behind it nothing
    runs again, and what is before it is silent. Experts' writers, each of which sees some tokens
    only, stay projected: of a block of experts the readers are fitted, the router among them.

    `grams` are those of the first site, `targets` the dense stream behind each writer, `counts` how
    many values each block returns.
    """
    group, small_stream = layer.group, layer.small_stream
    last = len(group.sites) - 1
    for number, site in enumerate(group.sites):
        if number:
            grams = stream_grams(refitter, targets[number - 1], small_stream)
        fit_readers(refitter, layer, site, grams)
        zeroed = {done.block: counts[done.block] for done in group.sites[:number]}
        if group.sparse and number == last:
            break
        target = targets[number]
        keep_inputs = number < last or refitter.execution.keeps_inputs
        inputs, kept_P = fit_writer(refitter, layer, number, target, zeroed, keep_inputs)
        if keep_inputs:
            writer = _linear_writer(refitter, layer, number, kept_P)
            add_to_stream(small_stream, inputs, writer, refitter.execution)
        if number == last and keep_inputs:
            return
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


def _run_dense(refitter: Refitter, dense: DenseLayer) -> tuple[list[Tensor], ValueCounts]:
    """Run the dense layer.

    Returns the stream after each of its writers, and how many values each of its blocks returns.
    """
    family, hidden = refitter.family, dense.stream.hidden
    between = [
        refitter.execution.empty_stream(tuple(hidden.shape), hidden.dtype) for _ in family.sites[1:]
    ]
    probes = {}
    for site, place in zip(family.sites[1:], between, strict=True):

        def keep(rows: slice, x: Tensor, place: Tensor = place) -> None:
            store(place[rows], x, refitter.execution.device)

        probes[site.norm] = keep
    blocks = [site.block for site in family.sites]
    with value_counts(dense.model.layer(dense.index), blocks) as counts:
        run_layer(dense.model, dense.index, dense.source, [(dense.stream, probes)])
    return [*between, hidden], counts
