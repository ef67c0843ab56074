"""The second streaming pass: build the small model layer by layer beside the dense one.

Dense and small streams run side by side over the calibration text. At each read site the readers
are fitted to turn the small stream into what the dense readers see; at each writer the surviving
inputs are chosen and the writer is fitted to bring the small stream back to the dense one. What
has been fitted is rounded to the dtype of the export before the next fit sees its output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sp3llm.compression.attention import cut_attention
from sp3llm.compression.projecting import (
    prefetch_groups,
    project_and_round,
)
from sp3llm.compression.readers import fit_head, fit_readers, stream_grams
from sp3llm.compression.refitter import (
    Built,
    Refitter,
    overflow_refused,
)
from sp3llm.compression.writers import fit_embeddings, fit_parallel, fit_writer
from sp3llm.models import families
from sp3llm.models.families import Group
from sp3llm.models.head import token_losses
from sp3llm.models.hooks import Arities
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.stock import empty_model
from sp3llm.models.stream import Stream, add_to_stream, open_stream, run_layer


def refitted_groups(
    refitter: Refitter,
    tokens: Tensor,
    start: int = 0,
    saved: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Built]:
    """Project, choose and refit every group in order, on `tokens`, `(windows, tokens)`, of which
    every process takes its share.

    From group `start` on, with the dense and small streams as they were `saved` before it.
    """
    family, execution = refitter.family, refitter.execution
    local_windows = execution.local_windows(*tokens.shape)
    tokens = tokens[local_windows]
    bounds = (int((local_windows < b).sum()) for b in (refitter.held_from, refitter.unseen_from))
    refitter = replace(refitter, **dict(zip(("held_from", "unseen_from"), bounds, strict=True)))
    groups = families.groups(family, refitter.dense.config)
    shells = _shells(refitter)
    dense_model = empty_model(refitter.dense.config)
    if saved is not None:
        table = refitter.dense.read(groups[0].parameters)
        dense_stream = open_stream(dense_model, family, table, tokens, execution, saved[0])
        projected = project_and_round(
            family, refitter.projection, refitter.dtype, execution.device, groups[0], table
        )
        small_stream = open_stream(shells[0], family, projected, tokens, execution, saved[1])
    sources = prefetch_groups(refitter.dense, family, groups[start:], execution.device)
    for index, (group, source) in enumerate(sources, start):
        tensors = project_and_round(
            family, refitter.projection, refitter.dtype, execution.device, group, source
        )
        with overflow_refused():
            if group.name == "embeddings":
                dense_stream = open_stream(dense_model, family, source, tokens, execution)
                small_stream = open_stream(shells[0], family, tensors, tokens, execution)
                if fit_embeddings(refitter, tensors, tokens, dense_stream, small_stream):
                    small_stream = open_stream(shells[0], family, tensors, tokens, execution)
            elif group.name == "head":
                fit_head(refitter, source, tensors, dense_stream, small_stream)
            else:
                _fit_layer(
                    refitter, index - 1, group, source, tensors, dense_model, shells, dense_stream,
                    small_stream,
                )  # fmt: skip
        yield Built(index, group, tensors, dense_stream, small_stream)


def trial_loss(refitter: Refitter, tokens: Tensor) -> float:
    """Mean loss, in nats a token, of a refitted model on the windows no fit saw.

    Nothing is written: the small stream goes through each layer as it is fitted.
    """
    family, config, execution = refitter.family, refitter.dense.config, refitter.execution
    small_config = resized_config(family, config, refitter.shape)
    for built in refitted_groups(refitter, tokens):
        if built.group.name == "embeddings":
            table = built.tensors[family.embedding]
    head, stream = built.tensors, built.small
    if refitter.shape.tie_word_embeddings:
        head = {**head, f"{family.head}.weight": table}
    local_windows = execution.local_windows(*tokens.shape)
    unseen = local_windows >= refitter.unseen_from
    ends = Stream(stream.hidden[unseen], stream.calls)
    model = empty_model(small_config)
    losses = token_losses(model, family, head, ends, tokens[local_windows[unseen]], execution)
    total = torch.tensor([losses.sum(), losses.numel()], dtype=torch.float64)
    execution.ranks.all_reduce_(total)
    return (total[0] / total[1]).item()


def _shells(refitter: Refitter) -> list[nn.Module]:
    """Empty small models whose first 0, 1, ... writers have their inputs cut already."""
    family, dense, shape = refitter.family, refitter.dense.config, refitter.shape
    whole = Shape.of(family, dense)
    start = replace(shape, intermediate_size=whole.intermediate_size)
    if not families.is_square(family, dense):  # else attention is cut before anything else
        start = start.with_axis_of(whole, families.QUERY)
    steps = [start]
    for writer in family.writers:
        axis = family.layer[f"{writer}.weight"][1]
        steps.append(steps[-1].with_axis_of(shape, axis))
    return [empty_model(resized_config(family, dense, step)) for step in steps]


def _fit_layer(
    refitter: Refitter,
    index: int,
    group: Group,
    source: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    dense_model: nn.Module,
    shells: list[nn.Module],
    dense_stream: Stream,
    small_stream: Stream,
) -> None:
    """Fit one layer, `tensors` in place, and send both streams through it.

    The small stream moves on by each fitted writer's own output; of the blocks behind it nothing
    runs again, and what is before it is silent. Experts' writers, each of which sees some tokens
    only, stay projected: of a block of experts the readers are fitted, the router among them.
    """
    family, execution = refitter.family, refitter.execution
    narrow = cut_attention(family, group, source, refitter.projection)
    if families.is_parallel(family, refitter.dense.config):
        streams = (dense_stream, small_stream)
        fit_parallel(
            refitter, index, group, (source, narrow, tensors), dense_model, shells, streams
        )
        return
    grams = stream_grams(refitter, dense_stream.hidden, small_stream)
    targets, arities = _run_dense(refitter, index, source, dense_model, dense_stream)
    last = len(group.sites) - 1
    for number, site in enumerate(group.sites):
        if number:
            grams = stream_grams(refitter, targets[number - 1], small_stream)
        fit_readers(refitter, group, site, grams, narrow, tensors)
        zeroed = {done.block: arities[done.block] for done in group.sites[:number]}
        if group.sparse and number == last:
            break
        inputs, kept_P = fit_writer(
            refitter, index, group, number, targets[number], tensors, shells[number], small_stream,
            zeroed, keep_inputs=number < last,
        )  # fmt: skip
        if number < last:
            name = f"{group.prefix}{family.writers[number]}"
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            add_to_stream(
                small_stream, inputs, kept_P, weight, bias, refitter.multiplier, execution,
                f"the small {name}",
            )  # fmt: skip
    # The last writer's inputs are the widest of all: running its block again costs less memory.
    run_layer(shells[-1], family, index, tensors, [(small_stream, {})], execution, zeroed=zeroed)


def _run_dense(
    refitter: Refitter,
    index: int,
    source: Mapping[str, Tensor],
    dense_model: nn.Module,
    dense_stream: Stream,
) -> tuple[list[Tensor], Arities]:
    """Run the dense layer; the stream after each of its writers."""
    family, hidden = refitter.family, dense_stream.hidden
    between = [
        refitter.execution.empty_stream(tuple(hidden.shape), hidden.dtype) for _ in family.sites[1:]
    ]
    probes = {}
    for site, store in zip(family.sites[1:], between, strict=True):

        def keep(rows: slice, x: Tensor, store: Tensor = store) -> None:
            store[rows] = x.to(store.device)

        probes[site.norm] = keep
    arities: Arities = {site.block: None for site in family.sites}
    streams = [(dense_stream, probes)]
    run_layer(dense_model, family, index, source, streams, refitter.execution, arities=arities)
    return [*between, dense_stream.hidden], arities
