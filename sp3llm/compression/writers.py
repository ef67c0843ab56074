"""Choose what a writer keeps, and fit it to chase the dense stream."""

from dataclasses import replace

import torch
from torch import Tensor

from sp3llm.compression.projecting import rounded, unit_sizes
from sp3llm.compression.readers import fit_readers
from sp3llm.compression.refitter import (
    LayerFit,
    Refitter,
    add_tokens,
    all_reduce_grams,
    empty_grams,
    fit_ridge,
    solves_in,
)
from sp3llm.compression.units import cut_units, kept_rows
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.moments import LEAST_MEAN_SQUARE, mean_square, root_mean_square
from sp3llm.maths.products import operand, product, widen
from sp3llm.maths.refit import Gram, restricted, schur_complement, sum_grams
from sp3llm.maths.unit_selection import select_units
from sp3llm.models import families
from sp3llm.models.shapes import Shape
from sp3llm.models.stream import LayerPart, Stream, probe_stream, run_layer
from sp3llm.runtime.transfer import fetch, store

# Ridge of the writer that neurons and groups are chosen by, relative to the mean diagonal.
CHOICE_RIDGE = 1e-4


def fit_parallel(refitter: Refitter, layer: LayerFit, site_grams: tuple[Gram, Gram]) -> None:
    """Fit a layer whose blocks read the same stream, and send the small stream through it; the
    dense one has gone through it, and `site_grams` are from before.

    All its writers are fitted in one regression, their inputs side by side: one after the other,
    the first would chase what the second is there for (docs/design.md 3.7).
    """
    family = refitter.family
    for site in family.sites:
        fit_readers(refitter, layer, site, site_grams)
    names = [layer.name(writer) for writer in family.writers]
    priors = [layer.tensors[f"{name}.weight"].T.double() for name in names]
    biases = [f"{name}.bias" for name in names if f"{name}.bias" in layer.tensors]
    prior_PK = torch.cat(priors)
    prior_biases = [layer.tensors[bias].double() for bias in biases]
    prior_bias_K = sum(prior_biases[1:], prior_biases[0]) if biases else None
    grams = _parallel_grams(refitter, layer, prior_PK)
    kept = _parallel_survivors(refitter, layer, grams, priors)
    kept_P = torch.cat(kept)
    grams = tuple(restricted(gram, kept_P) for gram in grams)
    fit = fit_ridge(
        refitter, " + ".join(names), grams, prior_PK[kept_P], prior_bias_K, by_input=True
    )
    rows = fit.solution_PQ.split([len(members) for members in kept])
    for name, rows_PK in zip(names, rows, strict=True):
        layer.tensors[f"{name}.weight"] = rounded(f"{name}.weight", rows_PK.T, refitter.dtype)
    constant_K = fit.intercept_Q
    for bias in biases:  # the first carries the constant of all
        layer.tensors[bias] = rounded(bias, constant_K, refitter.dtype)
        constant_K = torch.zeros_like(constant_K)
    run_layer(layer.small_models[-1], layer.index, layer.tensors, [(layer.small_stream, {})])


def _parallel_grams(refitter: Refitter, layer: LayerFit, prior_PK: Tensor) -> tuple[Gram, Gram]:
    """Grams of all writers' inputs in a row, in the order of the writers, and of what is missing in
    the small stream.
    """
    family = refitter.family
    grams = empty_grams(refitter, *prior_PK.shape)
    inputs: list[Tensor] = []

    def add_batch(rows: slice, a: Tensor) -> None:
        inputs.append(operand(a))
        if len(inputs) == len(family.writers):
            target = layer.dense.stream.hidden
            missing, weight = _missing(refitter, target, layer.small_stream, rows)
            add_tokens(refitter, grams, rows, torch.cat(inputs, -1), missing, weight)
            inputs.clear()

    streams = [(layer.small_stream, dict.fromkeys(family.writers, add_batch))]
    part = LayerPart(stop_before=family.writers[-1])
    run_layer(layer.small_models[0], layer.index, layer.tensors, streams, part)
    all_reduce_grams(refitter, grams)
    return grams


def _parallel_survivors(
    refitter: Refitter, layer: LayerFit, grams: tuple[Gram, Gram], priors: list[Tensor]
) -> list[Tensor]:
    """Of every writer the inputs that stay, as indices into the row of all writers' inputs.

    They are chosen one writer after the other, each as if the others' inputs all stayed.
    """
    both, kept, start = sum_grams(*grams), [], 0
    for writer, prior_PK in zip(refitter.family.writers, priors, strict=True):
        members_P = torch.arange(start, start + len(prior_PK), device=prior_PK.device)
        start += len(prior_PK)
        if _units_of(refitter, writer) is not None:
            own = schur_complement(both, members_P, CHOICE_RIDGE)
            members_P = members_P[_survivors(refitter, layer, writer, own, prior_PK)]
        kept.append(members_P)
    return kept


def fit_embeddings(
    refitter: Refitter,
    tensors: dict[str, Tensor],
    tokens: Tensor,
    dense_stream: Stream,
    small_stream: Stream,
) -> bool:
    """Fit the projection into the stream to what a narrower embedding table has left; whether
    there was anything to fit.

    It is one more writer: `P' = argmin sum_t |c X T - L - e P'^T|^2 / mean(X^2) + lambda |P' - c
    T^T P Z|^2` with `e` a token's embedding and `L` its learned position. The table itself, whose
    other role is the head's, stays as the basis of both (`compression.basis_choice.choose_basis`)
    leaves it.
    """
    embedding_EJ = refitter.projection.embedding_EJ
    if embedding_EJ is None or embedding_EJ.shape[0] == embedding_EJ.shape[1]:
        return False
    name = f"{refitter.family.projections[0]}.weight"
    table_VJ = tensors[refitter.family.embedding].to(refitter.execution.device)
    prior_JK = tensors[name].T.double()
    grams = empty_grams(refitter, *prior_JK.shape)

    def add_batch(rows: slice, _: Tensor) -> None:
        looked_up = table_VJ[tokens[rows].to(table_VJ.device)]
        embedded = operand(looked_up.to(refitter.execution.dtype))
        missing, weight = _missing(refitter, dense_stream.hidden, small_stream, rows)
        wide = widen(embedded)
        missing = missing * refitter.multiplier + wide @ prior_JK.to(wide)
        add_tokens(refitter, grams, rows, embedded, missing, weight)

    probe_stream(small_stream, add_batch, refitter.execution)
    all_reduce_grams(refitter, grams)
    fit = fit_ridge(refitter, name, grams, prior_JK)
    tensors[name] = rounded(name, fit.solution_PQ.T, refitter.dtype)
    return True


def fit_writer(
    refitter: Refitter,
    layer: LayerFit,
    number: int,
    target: Tensor,
    front: LayerPart,
    keep_inputs: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Choose the surviving inputs of a layer's writer `number` and fit it to the dense stream.

    `W' = argmin sum_t |c X_out T - X' - r a' W'^T|^2 / mean(X_out^2) + lambda |W' - c T^T W|^2`:
    each token weighs as the next norm will read it; `r` is the family's multiplier. `target` is
    `X_out`, `(windows, tokens, D)`; in `front` the blocks in front are silent, whose output is in
    the small stream already. With `scales`, `(windows, tokens, 1)`, each token of the target is
    taken at that root mean square.

    Returns the inputs, `(windows, tokens, P)`, if they are to be kept, and the indices of those
    that survive; None: all do.
    """
    execution, tensors = refitter.execution, layer.tensors
    writer = refitter.family.writers[number]
    name = layer.name(writer)
    prior_PK = tensors[f"{name}.weight"].T.double()
    bias_K = tensors.get(f"{name}.bias")
    prior_bias_K = None if bias_K is None else bias_K.double()
    grams = empty_grams(refitter, *prior_PK.shape)
    inputs: Tensor | None = None
    if keep_inputs:
        inputs = execution.empty_stream((*target.shape[:2], len(prior_PK)), target.dtype)

    def add_batch(rows: slice, a: Tensor) -> None:
        missing, weight = _missing(refitter, target, layer.small_stream, rows, scales)
        real = layer.small_stream.real
        add_tokens(refitter, grams, rows, operand(a), missing, weight, real)
        if inputs is not None:
            store(inputs[rows], a, execution.device)

    streams = [(layer.small_stream, {writer: add_batch})]
    part = replace(front, stop_before=writer)
    run_layer(layer.small_models[number], layer.index, tensors, streams, part)
    all_reduce_grams(refitter, grams)
    kept_P = None
    if _units_of(refitter, writer) is not None:
        kept_P = _survivors(refitter, layer, writer, sum_grams(*grams), prior_PK)
        grams, prior_PK = tuple(restricted(gram, kept_P) for gram in grams), prior_PK[kept_P]
    fit = fit_ridge(refitter, name, grams, prior_PK, prior_bias_K, by_input=True)
    tensors[f"{name}.weight"] = rounded(f"{name}.weight", fit.solution_PQ.T, refitter.dtype)
    if bias_K is not None:
        tensors[f"{name}.bias"] = rounded(f"{name}.bias", fit.intercept_Q, refitter.dtype)
    return inputs, kept_P


def _missing(
    refitter: Refitter,
    target: Tensor,
    small_stream: Stream,
    rows: slice,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a writer has to add, `(c X_out T - X') / r`, and what each token weighs."""
    family, execution, writes_DK = refitter.family, refitter.execution, refitter.projection.writes()
    wanted = operand(fetch(target[rows], execution.device))
    if scales is not None:
        scale = fetch(scales[rows], execution.device) / root_mean_square(wanted, family.centred)
        wanted = (wanted * scale).to(wanted.dtype)
    wide = there = widen(wanted)
    if not refitter.projection.keeps_channels:
        scaled_DK = (stream_scale(writes_DK) * writes_DK).to(there.dtype)
        there = product(wanted.flatten(0, 1).T, scaled_DK).unflatten(0, wanted.shape[:2])
    missing = there - widen(fetch(small_stream.hidden[rows], execution.device))
    if family.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    weight = 1 / mean_square(wide)[..., 0].clamp_min(LEAST_MEAN_SQUARE)
    return missing.div_(refitter.multiplier), weight


def _units_of(refitter: Refitter, writer: str) -> tuple[int, dict[str, int]] | None:
    """How many units, neurons or KV groups, of a writer's inputs are kept, and the length of one
    along every axis that is cut with them; None: all that are left are kept.
    """
    family, shape = refitter.family, refitter.shape
    dense = Shape.of(family, refitter.dense.config)
    axis = family.layer[f"{writer}.weight"][1]
    if axis == families.FFN:
        if refitter.neurons_LF is not None:  # the others are gone already
            return None
        keep, total = shape.intermediate_size, dense.intermediate_size
    else:
        # Query heads say how many go: where key-value heads are merged, they all stay.
        total = dense.num_key_value_heads
        keep = total * shape.num_attention_heads // dense.num_attention_heads
    if keep == total or (axis != families.FFN and refitter.projection.attention_cut is not None):
        return None
    return keep, unit_sizes(dense, axis)


def _survivors(
    refitter: Refitter, layer: LayerFit, writer: str, gram: Gram, prior_PK: Tensor
) -> Tensor:
    """Indices of the inputs that a writer keeps, `(P,)`, of those in `gram`; whatever feeds the
    others is cut away from the layer's tensors.

    They are those of a learned mask, where there is one, and elsewhere those without which the
    refitted writer would lose most.
    """
    family, kept_units = refitter.family, refitter.projection.kept_units
    keep, units = _units_of(refitter, writer)
    sizes = families.axis_sizes(family, refitter.dense.config)
    axis = family.layer[f"{writer}.weight"][1]
    unit = units[axis]
    kept_U = None if kept_units is None else kept_units.kept(axis, layer.dense.group.layer)
    if kept_U is None:
        method = refitter.unit_selection
        dtype = solves_in(refitter.execution)
        kept_P = select_units(gram, prior_PK, keep, unit, method, CHOICE_RIDGE, dtype)
        refitter.execution.ranks.broadcast_(kept_P)
        kept_U = kept_P.reshape(keep, unit)[:, 0] // unit
    else:
        kept_P = kept_rows(axis, kept_U, units, sizes)
    name = f"{layer.name(writer)}.weight"
    others = {other: tensor for other, tensor in layer.tensors.items() if other != name}
    layer.tensors.update(cut_units(layer.group, others, kept_U, units, sizes))
    return kept_P
