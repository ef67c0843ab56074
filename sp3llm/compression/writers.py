"""Choose what a writer keeps, and fit it to chase the dense stream."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sp3llm.compression.projecting import rounded, unit_sizes
from sp3llm.compression.readers import fit_readers, stream_grams
from sp3llm.compression.refitter import (
    Refitter,
    add_tokens,
    all_reduce_grams,
    fit_ridge,
)
from sp3llm.compression.units import cut_units, kept_rows
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.products import widen
from sp3llm.maths.refit import (
    Gram,
    empty_gram,
    restricted,
    schur_complement,
    sum_grams,
)
from sp3llm.maths.unit_selection import select_units
from sp3llm.models import families
from sp3llm.models.families import Group
from sp3llm.models.shapes import Shape
from sp3llm.models.stream import Stream, probe_stream, run_layer

# Ridge of the writer that neurons and groups are chosen by, relative to the mean diagonal.
_CHOICE_RIDGE = 1e-4


def fit_parallel(
    refitter: Refitter,
    index: int,
    group: Group,
    layers: tuple[Mapping[str, Tensor], Mapping[str, Tensor], dict[str, Tensor]],
    dense_model: nn.Module,
    shells: list[nn.Module],
    streams: tuple[Stream, Stream],
) -> None:
    """Fit a layer whose blocks read the same stream: all writers in one regression.

    One after the other, the first would chase what the second is there for (DESIGN 3.7). `layers`
    are the dense tensors, those with attention cut, and the small ones, in place.
    """
    family, execution = refitter.family, refitter.execution
    (source, narrow, tensors), (dense_stream, small_stream) = layers, streams
    grams = stream_grams(refitter, dense_stream.hidden, small_stream)
    for site in family.sites:
        fit_readers(refitter, group, site, grams, narrow, tensors)
    run_layer(dense_model, family, index, source, [(dense_stream, {})], execution)
    names = [f"{group.prefix}{writer}" for writer in family.writers]
    priors = [tensors[f"{name}.weight"].T.double() for name in names]
    biases = [tensors[f"{name}.bias"].double() for name in names if f"{name}.bias" in tensors]
    prior_PK = torch.cat(priors)
    grams = tuple(empty_gram(*prior_PK.shape, execution.device) for _ in range(2))
    seen: list[Tensor] = []

    def see(rows: slice, a: Tensor) -> None:
        seen.append(widen(a))
        if len(seen) == len(names):
            missing, weight = _missing(refitter, dense_stream.hidden, small_stream, rows)
            add_tokens(refitter, grams, rows, torch.cat(seen, -1), missing, weight)
            seen.clear()

    probes = dict.fromkeys(family.writers, see)
    stop_before = family.writers[-1]
    run_layer(
        shells[0],
        family,
        index,
        tensors,
        [(small_stream, probes)],
        execution,
        stop_before=stop_before,
    )
    all_reduce_grams(refitter, grams)
    both, kept, start = sum_grams(*grams), [], 0
    for writer, prior in zip(family.writers, priors, strict=True):
        members_P = torch.arange(start, start + len(prior), device=prior.device)
        start += len(prior)
        if _units_of(refitter, writer) is None:
            kept.append(members_P)
            continue
        part = schur_complement(both, members_P, _CHOICE_RIDGE)
        kept.append(members_P[_survivors(refitter, group, writer, part, prior, tensors)])
    kept_P = torch.cat(kept)
    grams = tuple(restricted(gram, kept_P) for gram in grams)
    prior_bias_K = sum(biases[1:], biases[0]) if biases else None
    fit = fit_ridge(refitter, " + ".join(names), grams, prior_PK[kept_P], prior_bias_K)
    rows = fit.solution_PQ.split([len(members) for members in kept])
    constant_K = fit.intercept_Q
    for name, rows_PK in zip(names, rows, strict=True):
        tensors[f"{name}.weight"] = rounded(f"{name}.weight", rows_PK.T, refitter.dtype)
        if f"{name}.bias" in tensors:  # the first bias carries the constant of both
            tensors[f"{name}.bias"] = rounded(f"{name}.bias", constant_K, refitter.dtype)
            constant_K = torch.zeros_like(constant_K)
    run_layer(shells[-1], family, index, tensors, [(small_stream, {})], execution)


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
    other role is the head's, stays as the basis of both (`measure.choose_basis`) leaves it.
    """
    embedding_EJ = refitter.projection.embedding_EJ
    if embedding_EJ is None or embedding_EJ.shape[0] == embedding_EJ.shape[1]:
        return False
    name = f"{refitter.family.projections[0]}.weight"
    table_VJ = tensors[refitter.family.embedding].to(refitter.execution.device)
    prior_JK = tensors[name].T.double()
    grams = tuple(empty_gram(*prior_JK.shape, refitter.execution.device) for _ in range(2))

    def see(rows: slice, x: Tensor) -> None:
        embedded = widen(table_VJ[tokens[rows].to(table_VJ.device)])
        missing, weight = _missing(refitter, dense_stream.hidden, small_stream, rows)
        missing = missing * refitter.multiplier + embedded @ prior_JK.to(embedded)
        add_tokens(refitter, grams, rows, embedded, missing, weight)

    probe_stream(small_stream, see, refitter.execution)
    all_reduce_grams(refitter, grams)
    fit = fit_ridge(refitter, name, grams, prior_JK)
    tensors[name] = rounded(name, fit.solution_PQ.T, refitter.dtype)
    return True


# --------------------------------------------------------------------------- writers


def fit_writer(
    refitter: Refitter,
    index: int,
    group: Group,
    number: int,
    target: Tensor,
    tensors: dict[str, Tensor],
    shell: nn.Module,
    small_stream: Stream,
    zeroed: Mapping[str, int | None],
    keep_inputs: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Choose the writer's surviving inputs and fit it to chase the dense stream.

    `W' = argmin sum_t |c X_out T - X' - r a' W'^T|^2 / mean(X_out^2) + lambda |W' - c T^T W|^2`:
    each token weighs as the next norm will read it; `r` is the family's multiplier.

    Returns the inputs, `(windows, tokens, P)`, if they are to be kept, and the indices of those
    that survive; None: all do.
    """
    family, execution = refitter.family, refitter.execution
    writer = family.writers[number]
    name = f"{group.prefix}{writer}"
    prior_PK = tensors[f"{name}.weight"].T.double()
    bias = tensors.get(f"{name}.bias")
    prior_bias_K = None if bias is None else bias.double()
    grams = tuple(empty_gram(*prior_PK.shape, execution.device) for _ in range(2))
    inputs: Tensor | None = None
    if keep_inputs:
        inputs = execution.empty_stream((*target.shape[:2], len(prior_PK)), target.dtype)

    def see(rows: slice, a: Tensor) -> None:
        missing, weight = _missing(refitter, target, small_stream, rows)
        add_tokens(refitter, grams, rows, widen(a), missing, weight)
        if inputs is not None:
            inputs[rows] = a.to(inputs.device)

    streams = [(small_stream, {writer: see})]
    run_layer(shell, family, index, tensors, streams, execution, stop_before=writer, zeroed=zeroed)
    all_reduce_grams(refitter, grams)
    kept_P = None
    if _units_of(refitter, writer) is not None:
        kept_P = _survivors(refitter, group, writer, sum_grams(*grams), prior_PK, tensors)
        grams, prior_PK = tuple(restricted(gram, kept_P) for gram in grams), prior_PK[kept_P]
    fit = fit_ridge(refitter, name, grams, prior_PK, prior_bias_K)
    tensors[f"{name}.weight"] = rounded(f"{name}.weight", fit.solution_PQ.T, refitter.dtype)
    if bias is not None:
        tensors[f"{name}.bias"] = rounded(f"{name}.bias", fit.intercept_Q, refitter.dtype)
    return inputs, kept_P


def _missing(
    refitter: Refitter, target: Tensor, small_stream: Stream, rows: slice
) -> tuple[Tensor, Tensor]:
    """What a writer has to add, `(c X_out T - X') / r`, and what each token weighs."""
    family, execution, writes_DK = refitter.family, refitter.execution, refitter.projection.writes()
    wanted = widen(target[rows].to(execution.device))
    scaled_DK = (stream_scale(writes_DK) * writes_DK).to(wanted)
    missing = wanted @ scaled_DK - widen(small_stream.hidden[rows].to(execution.device))
    if family.centred:
        wanted = wanted - wanted.mean(-1, keepdim=True)
    weight = 1 / wanted.square().mean(-1).clamp_min(1e-12)
    return missing / refitter.multiplier, weight


def _units_of(refitter: Refitter, writer: str) -> tuple[int, dict[str, int]] | None:
    """How many units of a writer's inputs are kept, and the length of one along every axis that
    goes with it; None: all are kept.
    """
    family, shape = refitter.family, refitter.shape
    dense = Shape.of(family, refitter.dense.config)
    axis = family.layer[f"{writer}.weight"][1]
    if axis == families.FFN:
        keep, total = shape.intermediate_size, dense.intermediate_size
    else:
        keep, total = shape.num_key_value_heads, dense.num_key_value_heads
    if keep == total or (axis != families.FFN and refitter.projection.attention_cut is not None):
        return None
    return keep, unit_sizes(dense, axis)


def _survivors(
    refitter: Refitter,
    group: Group,
    writer: str,
    gram: Gram,
    prior_PK: Tensor,
    tensors: dict[str, Tensor],
) -> Tensor:
    """Kept inputs of a writer that is to be cut, and everything that feeds the others cut away.

    They are those of a learned mask, where there is one, and those without which the refit loses
    least elsewhere.
    """
    family, kept_units = refitter.family, refitter.projection.kept_units
    keep, units = _units_of(refitter, writer)
    sizes = families.axis_sizes(family, refitter.dense.config)
    axis = family.layer[f"{writer}.weight"][1]
    unit = units[axis]
    kept_U = None if kept_units is None else kept_units.kept(axis, group.layer)
    if kept_U is None:
        kept_P = select_units(gram, prior_PK, keep, unit, refitter.unit_selection, _CHOICE_RIDGE)
        refitter.execution.ranks.broadcast_(kept_P)
        kept_U = kept_P.reshape(keep, unit)[:, 0] // unit
    else:
        kept_P = kept_rows(axis, kept_U, units, sizes)
    name = f"{group.prefix}{writer}.weight"
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    tensors |= cut_units(group, others, kept_U, units, sizes)
    return kept_P
