"""The second streaming pass: build the small model layer by layer beside the dense one.

Dense and small streams run side by side over the calibration text. At each read site the readers
are fitted to turn the small stream into what the dense readers see; at each writer the surviving
inputs are chosen and the writer is fitted to bring the small stream back to the dense one. What
has been fitted is rounded to the dtype of the export before the next fit sees its output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm import families
from sp3llm.checkpoint import Checkpoint
from sp3llm.errors import UserError
from sp3llm.execution import Execution, ahead
from sp3llm.families import VOCAB, Family, Group, Site
from sp3llm.moments import normalise, widen
from sp3llm.plan import Shape, resized_config
from sp3llm.project import (
    Projection,
    cut_units,
    gate_writers,
    gated_writers,
    head_reader,
    kept_rows,
    narrow_attention,
    norm_of,
    place_reader,
    project_group,
    stream_scale,
)
from sp3llm.refit import (
    RIDGES,
    Fit,
    Gram,
    add_to_gram,
    beside,
    choose_units,
    empty_gram,
    joined,
    parts,
    restricted,
    ridge_errors,
    ridge_fit,
    ridge_solution,
)
from sp3llm.stream import (
    Returns,
    Stream,
    add_to_stream,
    empty_model,
    open_stream,
    probe_stream,
    run_layer,
    token_losses,
)

# Held back from every fit to choose its ridge: one window in this many, one at least.
_HELD_BACK = 8
# Entries of a vocabulary's table that are transformed at once, in float64.
_TABLE_PIECE = 2**23
# Ridge of the writer that neurons and groups are chosen by, relative to the mean diagonal.
_CHOICE_RIDGE = 1e-4


@dataclass(frozen=True)
class Refitter:
    """What every step of the second pass needs."""

    dense: Checkpoint
    family: Family
    shape: Shape
    projection: Projection
    dtype: torch.dtype
    """Of the export: fitted tensors are rounded to it before their output is used."""
    on: Execution
    choose: str
    """How neurons and groups are chosen: see `refit.choose_units`."""
    held_from: int
    """First window that is held back to choose ridges."""
    unseen_from: int
    """First window that no fit sees at all, for trials to be scored on."""
    log: list[dict[str, Any]]
    """One entry a fit."""

    @property
    def eps(self) -> float:
        """The norms' epsilon."""
        return families.norm_eps(self.family, self.dense.config)

    @property
    def multiplier(self) -> float:
        """The family's factor on what writers add to the stream."""
        return families.residual_multiplier(self.family, self.dense.config)


@dataclass(frozen=True)
class Built:
    """A finished group, and both streams behind it."""

    index: int
    group: Group
    tensors: Mapping[str, Tensor]
    dense: Stream | None = None
    small: Stream | None = None


def plain_groups(
    dense: Checkpoint,
    family: Family,
    projection: Projection,
    dtype: torch.dtype,
    on: Execution,
    start: int = 0,
) -> Iterator[Built]:
    """Fold, rotate and cut every group from number `start` on, and nothing else."""
    groups = families.groups(family, dense.config)[start:]
    for index, (group, source) in enumerate(_sources(dense, family, groups, on, start), start):
        device = on.turn(index).device
        here = projection.to(device)
        tensors = _projected(family, here, dtype, device, group, source)
        yield Built(index, group, _without_losers(dense, family, here, group, tensors))


def _without_losers(
    dense: Checkpoint,
    family: Family,
    projection: Projection,
    group: Group,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """A layer without what a learned mask does not keep, where no refit cuts it away."""
    sizes = families.axis_sizes(family, dense.config)
    for _, axis in gated_writers(family, group) if projection.winners else ():
        kept_U = projection.winners.kept(axis, group.layer)
        narrowed = axis == families.QUERY and projection.narrowing is not None
        if kept_U is not None and not narrowed:
            units = _units(Shape.of(family, dense.config), axis)
            tensors = cut_units(group, tensors, kept_U, units, sizes)
    return tensors


def _units(dense: Shape, axis: str) -> dict[str, int]:
    """Length of a unit along every axis that goes with it."""
    if axis == families.FFN:
        return {families.FFN: 1}
    unit = dense.num_attention_heads // dense.num_key_value_heads * dense.head_dim
    return {families.QUERY: unit, families.KEY_VALUE: dense.head_dim}


def _sources(
    dense: Checkpoint, family: Family, groups: list[Group], on: Execution, start: int
) -> Iterator[tuple[Group, Mapping[str, Tensor]]]:
    """Groups with their dense tensors, read ahead; the head with a tied table under its name."""

    def load(group: Group) -> Mapping[str, Tensor]:
        if group.name == "head":
            return head_tensors(dense, family)
        return dense.read(group.parameters)

    return ahead(groups, load, on, start)


def _projected(
    family: Family,
    projection: Projection,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    source: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for piece in _pieces(family, projection, group, source):
        tensors = {name: tensor.to(device) for name, tensor in piece.items()}
        if group.prefix:
            tensors = gate_writers(family, group, tensors, projection.winners)
            tensors = narrow_attention(family, group, tensors, projection)
        projected = project_group(family, group, tensors, projection)
        for name, tensor in projected.items():
            if not found.get(name) or _in_rows(family, group, name):
                found.setdefault(name, []).append(rounded(name, tensor, dtype))
    return {name: torch.cat(p) if len(p) > 1 else p[0] for name, p in found.items()}


def _in_rows(family: Family, group: Group, name: str) -> bool:
    """Whether a tensor has a row for every token of the vocabulary."""
    is_head = group.name == "head" and name == f"{family.head}.weight"
    return is_head or group.parameters.get(name, ("",))[0] == VOCAB


def _pieces(
    family: Family, projection: Projection, group: Group, source: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """A group's tensors with the rows of a vocabulary's table a few at a time, where every row is
    transformed by itself: in float64 a whole table is larger than any layer.
    """
    tables = [name for name in source if _in_rows(family, group, name)]
    as_whole = projection.embedding_EJ is not None or projection.tied_scale_K is not None
    if not tables or (group.name == "head" and as_whole):
        yield source
        return
    rows, width = source[tables[0]].shape
    step = max(1, _TABLE_PIECE // width)
    for start in range(0, rows, step):
        yield {**source, **{name: source[name][start : start + step] for name in tables}}


def head_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Tensor]:
    """Final norm and head; a tied head's table under the head's own name."""
    *_, head = families.groups(family, checkpoint.config)
    tensors = checkpoint.read(head.parameters)
    if families.is_tied(family, checkpoint.config):
        table = checkpoint.read([family.embedding])[family.embedding]
        tensors[f"{family.head}.weight"] = table
    return tensors


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the dtype of the export.

    Raises UserError if a value does not fit it.
    """
    result = value.to(dtype)
    if not torch.isfinite(result).all():
        raise UserError(
            f"Tensor '{name}' of the compressed model does not fit {dtype}: use a --dtype of "
            "wider range, or look for extreme values in the checkpoint."
        )
    return result


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
    family, on = refitter.family, refitter.on
    mine = on.mine(*tokens.shape)
    tokens = tokens[mine]
    bounds = (int((mine < b).sum()) for b in (refitter.held_from, refitter.unseen_from))
    refitter = replace(refitter, **dict(zip(("held_from", "unseen_from"), bounds, strict=True)))
    groups = families.groups(family, refitter.dense.config)
    shells = _shells(refitter)
    dense_model = empty_model(refitter.dense.config)
    if saved is not None:
        table = refitter.dense.read(groups[0].parameters)
        dense_stream = open_stream(dense_model, family, table, tokens, on, saved[0])
        projected = _projected(
            family, refitter.projection, refitter.dtype, on.device, groups[0], table
        )
        small_stream = open_stream(shells[0], family, projected, tokens, on, saved[1])
    sources = _sources(refitter.dense, family, groups[start:], on, start)
    for index, (group, source) in enumerate(sources, start):
        here = on.turn(index)
        at = replace(refitter, on=here, projection=refitter.projection.to(here.device))
        tensors = _projected(family, at.projection, at.dtype, here.device, group, source)
        if group.name == "embeddings":
            dense_stream = open_stream(dense_model, family, source, tokens, here)
            small_stream = open_stream(shells[0], family, tensors, tokens, here)
            if _fit_embeddings(at, tensors, tokens, dense_stream, small_stream):
                small_stream = open_stream(shells[0], family, tensors, tokens, here)
        elif group.name == "head":
            _fit_head(at, source, tensors, dense_stream, small_stream)
        else:
            _fit_layer(
                at, index - 1, group, source, tensors, dense_model, shells, dense_stream,
                small_stream,
            )  # fmt: skip
        yield Built(index, group, tensors, dense_stream, small_stream)


def trial_loss(refitter: Refitter, tokens: Tensor) -> float:
    """Mean loss, in nats a token, of a refitted model on the windows no fit saw.

    Nothing is written: the small stream goes through each layer as it is fitted.
    """
    family, config, on = refitter.family, refitter.dense.config, refitter.on
    small_config = resized_config(family, config, refitter.shape)
    for built in refitted_groups(refitter, tokens):
        if built.group.name == "embeddings":
            table = built.tensors[family.embedding]
    head, stream = built.tensors, built.small
    if refitter.shape.tie_word_embeddings:
        head = {**head, f"{family.head}.weight": table}
    mine = on.mine(*tokens.shape)
    unseen = mine >= refitter.unseen_from
    ends = Stream(stream.hidden[unseen], stream.calls)
    model = empty_model(small_config)
    losses = token_losses(model, family, head, ends, tokens[mine[unseen]], on)
    total = torch.tensor([losses.sum(), losses.numel()], dtype=torch.float64)
    on.ranks.add_(total)
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
    family, on = refitter.family, refitter.on
    narrow = narrow_attention(family, group, source, refitter.projection)
    if families.is_parallel(family, refitter.dense.config):
        streams = (dense_stream, small_stream)
        _fit_parallel(
            refitter, index, group, (source, narrow, tensors), dense_model, shells, streams
        )
        return
    grams = _stream_grams(refitter, dense_stream.hidden, small_stream)
    targets, returns = _run_dense(refitter, index, source, dense_model, dense_stream)
    last = len(group.sites) - 1
    for number, site in enumerate(group.sites):
        if number:
            grams = _stream_grams(refitter, targets[number - 1], small_stream)
        _fit_readers(refitter, group, site, grams, narrow, tensors)
        silent = {done.block: returns[done.block] for done in group.sites[:number]}
        if group.sparse and number == last:
            break
        inputs, kept_P = _fit_writer(
            refitter, index, group, number, targets[number], tensors, shells[number], small_stream,
            silent, keep_inputs=number < last,
        )  # fmt: skip
        if number < last:
            name = f"{group.prefix}{family.writers[number]}"
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            add_to_stream(
                small_stream, inputs, kept_P, weight, bias, refitter.multiplier, on,
                f"the small {name}",
            )  # fmt: skip
    # The last writer's inputs are the widest of all: running its block again costs less memory.
    run_layer(shells[-1], family, index, tensors, [(small_stream, {})], on, silent=silent)


def _fit_parallel(
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
    family, on = refitter.family, refitter.on
    (source, narrow, tensors), (dense_stream, small_stream) = layers, streams
    grams = _stream_grams(refitter, dense_stream.hidden, small_stream)
    for site in family.sites:
        _fit_readers(refitter, group, site, grams, narrow, tensors)
    run_layer(dense_model, family, index, source, [(dense_stream, {})], on)
    names = [f"{group.prefix}{writer}" for writer in family.writers]
    priors = [tensors[f"{name}.weight"].T.double() for name in names]
    biases = [tensors[f"{name}.bias"].double() for name in names if f"{name}.bias" in tensors]
    prior_PK = torch.cat(priors)
    grams = tuple(empty_gram(*prior_PK.shape, on.device) for _ in range(2))
    seen: list[Tensor] = []

    def see(rows: slice, a: Tensor) -> None:
        seen.append(widen(a))
        if len(seen) == len(names):
            missing, weight = _missing(refitter, dense_stream.hidden, small_stream, rows)
            _add(refitter, grams, rows, torch.cat(seen, -1), missing, weight)
            seen.clear()

    probes = dict.fromkeys(family.writers, see)
    until = family.writers[-1]
    run_layer(shells[0], family, index, tensors, [(small_stream, probes)], on, until=until)
    _over_ranks(refitter, grams)
    both, kept, start = joined(*grams), [], 0
    for writer, prior in zip(family.writers, priors, strict=True):
        members_P = torch.arange(start, start + len(prior), device=prior.device)
        start += len(prior)
        if _units_of(refitter, writer) is None:
            kept.append(members_P)
            continue
        part = beside(both, members_P, _CHOICE_RIDGE)
        kept.append(members_P[_survivors(refitter, group, writer, part, prior, tensors)])
    kept_P = torch.cat(kept)
    grams = tuple(restricted(gram, kept_P) for gram in grams)
    prior_bias_K = sum(biases[1:], biases[0]) if biases else None
    fit = _fit(refitter, " + ".join(names), grams, prior_PK[kept_P], prior_bias_K)
    rows = fit.solution_PQ.split([len(members) for members in kept])
    constant_K = fit.intercept_Q
    for name, rows_PK in zip(names, rows, strict=True):
        tensors[f"{name}.weight"] = rounded(f"{name}.weight", rows_PK.T, refitter.dtype)
        if f"{name}.bias" in tensors:  # the first bias carries the constant of both
            tensors[f"{name}.bias"] = rounded(f"{name}.bias", constant_K, refitter.dtype)
            constant_K = torch.zeros_like(constant_K)
    run_layer(shells[-1], family, index, tensors, [(small_stream, {})], on)


def _run_dense(
    refitter: Refitter,
    index: int,
    source: Mapping[str, Tensor],
    dense_model: nn.Module,
    dense_stream: Stream,
) -> tuple[list[Tensor], Returns]:
    """Run the dense layer; the stream after each of its writers."""
    family, hidden = refitter.family, dense_stream.hidden
    between = [refitter.on.room(tuple(hidden.shape), hidden.dtype) for _ in family.sites[1:]]
    probes = {}
    for site, store in zip(family.sites[1:], between, strict=True):

        def keep(rows: slice, x: Tensor, store: Tensor = store) -> None:
            store[rows] = x.to(store.device)

        probes[site.norm] = keep
    returns: Returns = {site.block: None for site in family.sites}
    streams = [(dense_stream, probes)]
    run_layer(dense_model, family, index, source, streams, refitter.on, note=returns)
    return [*between, dense_stream.hidden], returns


def _fit_embeddings(
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
    table_VJ = tensors[refitter.family.embedding].to(refitter.on.device)
    prior_JK = tensors[name].T.double()
    grams = tuple(empty_gram(*prior_JK.shape, refitter.on.device) for _ in range(2))

    def see(rows: slice, x: Tensor) -> None:
        embedded = widen(table_VJ[tokens[rows].to(table_VJ.device)])
        missing, weight = _missing(refitter, dense_stream.hidden, small_stream, rows)
        missing = missing * refitter.multiplier + embedded @ prior_JK.to(embedded)
        _add(refitter, grams, rows, embedded, missing, weight)

    probe_stream(small_stream, see, refitter.on)
    _over_ranks(refitter, grams)
    fit = _fit(refitter, name, grams, prior_JK)
    tensors[name] = rounded(name, fit.solution_PQ.T, refitter.dtype)
    return True


# --------------------------------------------------------------------------- readers


def _add(
    refitter: Refitter,
    grams: tuple[Gram, Gram],
    rows: slice,
    a: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
) -> None:
    """Add a batch of windows to the fitting Gram and to the one held back."""
    bounds = (0, refitter.held_from, refitter.unseen_from)
    first, second, third = (min(max(bound - rows.start, 0), len(a)) for bound in bounds)
    for gram, part in zip(grams, (slice(first, second), slice(second, third)), strict=True):
        if len(a[part]):
            add_to_gram(gram, a[part], y[part], None if weight is None else weight[part])


def _over_ranks(refitter: Refitter, grams: tuple[Gram, Gram]) -> None:
    """Sum what every process saw of its windows."""
    for gram in grams:
        refitter.on.ranks.add_(*parts(gram))


def _fit(
    refitter: Refitter,
    name: str,
    grams: tuple[Gram, Gram],
    prior_PQ: Tensor,
    prior_intercept_Q: Tensor | None = None,
) -> Fit:
    """A ridge fit whose solves are shared out over processes, and its entry in the log."""
    ranks, intercept = refitter.on.ranks, prior_intercept_Q is not None
    own = ridge_errors(*grams, prior_PQ, intercept, ranks.share(RIDGES))
    by_rank = ranks.gathered(own)
    errors = [by_rank[i % ranks.count][i // ranks.count] for i in range(len(RIDGES))]
    fit = ridge_fit(*grams, prior_PQ, prior_intercept_Q, errors)
    ranks.copy_(fit.solution_PQ, fit.intercept_Q)
    _log(refitter, name, fit)
    return fit


def _stream_grams(
    refitter: Refitter, dense_hidden: Tensor, small_stream: Stream
) -> tuple[Gram, Gram]:
    """Grams of a site that reads the streams as they stand."""
    width, kept = refitter.projection.basis_DK.shape
    grams = tuple(empty_gram(kept, width, refitter.on.device) for _ in range(2))

    def see(rows: slice, x: Tensor) -> None:
        centred = refitter.family.centred
        dense_n = normalise(dense_hidden[rows].to(refitter.on.device), refitter.eps, centred)
        _add(refitter, grams, rows, normalise(x, refitter.eps, centred), dense_n)

    probe_stream(small_stream, see, refitter.on)
    _over_ranks(refitter, grams)
    return grams


def _reader_map(refitter: Refitter, grams: tuple[Gram, Gram], intercept: bool, name: str) -> Fit:
    """`argmin_M |n - n' M|^2 + lambda |M - T^T / c|^2`, `M` `(K, D)`."""
    basis_DK = refitter.projection.basis_DK
    prior_KD = basis_DK.T / stream_scale(basis_DK)
    zero_D = torch.zeros_like(prior_KD[0]) if intercept else None
    return _fit(refitter, name, grams, prior_KD, zero_D)


def _fit_readers(
    refitter: Refitter,
    group: Group,
    site: Site,
    grams: tuple[Gram, Gram],
    source: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Readers of one site through one map: `W' = W diag(g) M^T`, constants into their biases, or
    through the spare direction where they have none.
    """
    family = refitter.family
    names = [f"{group.prefix}{reader}" for reader in site.readers]
    norm = f"{group.prefix}{site.norm}"
    has_biases = all(f"{name}.bias" in source for name in names)
    fit = _reader_map(refitter, grams, has_biases or family.norm_bias, norm)
    norm_D, bias_D = norm_of(family, norm, source, fit.solution_PQ)
    for name in names:
        if f"{name}.bias" in source:
            tensors[f"{name}.bias"] = source[f"{name}.bias"].to(norm_D)
        matrix_FD = source[f"{name}.weight"].to(norm_D)
        constant_F = None if bias_D is None else matrix_FD @ bias_D
        _place(refitter, tensors, name, matrix_FD * norm_D, constant_F, fit)


def _place(
    refitter: Refitter,
    tensors: dict[str, Tensor],
    name: str,
    folded_FD: Tensor,
    constant_F: Tensor | None,
    fit: Fit,
) -> None:
    """Set one reader from its site's map and what its norm's bias gives it."""
    if fit.intercept_Q is not None:
        constant_F = folded_FD @ fit.intercept_Q + (0 if constant_F is None else constant_F)
    place_reader(tensors, name, folded_FD @ fit.solution_PQ.T, constant_F)
    for part in (f"{name}.weight", f"{name}.bias"):
        if part in tensors:
            tensors[part] = rounded(part, tensors[part], refitter.dtype)


def _fit_head(
    refitter: Refitter,
    source: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    dense_stream: Stream,
    small_stream: Stream,
) -> None:
    """The head, or the projection before a tied one, is one more reader.

    Without such a projection a tied table, with its two roles, stays as DESIGN 3.5 has it: the
    embeddings' role is exact within the subspace, and so is the head's.
    """
    family = refitter.family
    if refitter.projection.tied_scale_K is not None:
        return
    grams = _stream_grams(refitter, dense_stream.hidden, small_stream)
    fit = _reader_map(refitter, grams, family.norm_bias, family.final_norm)
    group = families.groups(family, refitter.dense.config)[-1]
    found: dict[str, list[Tensor]] = {}
    for piece in _pieces(family, refitter.projection, group, source):
        on_device = {name: tensor.to(refitter.on.device) for name, tensor in piece.items()}
        name, folded_FD, constant_F = head_reader(family, on_device, refitter.projection)
        placed = {part: tensors[part] for part in (f"{name}.bias",) if part in tensors}
        _place(refitter, placed, name, folded_FD, constant_F, fit)
        for part, tensor in placed.items():
            found.setdefault(part, []).append(tensor)
    tensors |= {part: torch.cat(p) if len(p) > 1 else p[0] for part, p in found.items()}


# --------------------------------------------------------------------------- writers


def _fit_writer(
    refitter: Refitter,
    index: int,
    group: Group,
    number: int,
    target: Tensor,
    tensors: dict[str, Tensor],
    shell: nn.Module,
    small_stream: Stream,
    silent: Mapping[str, int | None],
    keep_inputs: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Choose the writer's surviving inputs and fit it to chase the dense stream.

    `W' = argmin sum_t |c X_out T - X' - r a' W'^T|^2 / mean(X_out^2) + lambda |W' - c T^T W|^2`:
    each token weighs as the next norm will read it; `r` is the family's multiplier.

    Returns the inputs, `(windows, tokens, P)`, if they are to be kept, and the indices of those
    that survive; None: all do.
    """
    family, on = refitter.family, refitter.on
    writer = family.writers[number]
    name = f"{group.prefix}{writer}"
    prior_PK = tensors[f"{name}.weight"].T.double()
    bias = tensors.get(f"{name}.bias")
    prior_bias_K = None if bias is None else bias.double()
    grams = tuple(empty_gram(*prior_PK.shape, on.device) for _ in range(2))
    inputs: Tensor | None = None
    if keep_inputs:
        inputs = on.room((*target.shape[:2], len(prior_PK)), target.dtype)

    def see(rows: slice, a: Tensor) -> None:
        missing, weight = _missing(refitter, target, small_stream, rows)
        _add(refitter, grams, rows, widen(a), missing, weight)
        if inputs is not None:
            inputs[rows] = a.to(inputs.device)

    streams = [(small_stream, {writer: see})]
    run_layer(shell, family, index, tensors, streams, on, until=writer, silent=silent)
    _over_ranks(refitter, grams)
    kept_P = None
    if _units_of(refitter, writer) is not None:
        kept_P = _survivors(refitter, group, writer, joined(*grams), prior_PK, tensors)
        grams, prior_PK = tuple(restricted(gram, kept_P) for gram in grams), prior_PK[kept_P]
    fit = _fit(refitter, name, grams, prior_PK, prior_bias_K)
    tensors[f"{name}.weight"] = rounded(f"{name}.weight", fit.solution_PQ.T, refitter.dtype)
    if bias is not None:
        tensors[f"{name}.bias"] = rounded(f"{name}.bias", fit.intercept_Q, refitter.dtype)
    return inputs, kept_P


def _missing(
    refitter: Refitter, target: Tensor, small_stream: Stream, rows: slice
) -> tuple[Tensor, Tensor]:
    """What a writer has to add, `(c X_out T - X') / r`, and what each token weighs."""
    family, on, writes_DK = refitter.family, refitter.on, refitter.projection.writes()
    wanted = widen(target[rows].to(on.device))
    scaled_DK = (stream_scale(writes_DK) * writes_DK).to(wanted)
    missing = wanted @ scaled_DK - widen(small_stream.hidden[rows].to(on.device))
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
    if keep == total or (axis != families.FFN and refitter.projection.narrowing is not None):
        return None
    return keep, _units(dense, axis)


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
    family, winners = refitter.family, refitter.projection.winners
    keep, units = _units_of(refitter, writer)
    sizes = families.axis_sizes(family, refitter.dense.config)
    axis = family.layer[f"{writer}.weight"][1]
    unit = units[axis]
    kept_U = None if winners is None else winners.kept(axis, group.layer)
    if kept_U is None:
        weight_PK, _, used = ridge_solution(gram, prior_PK, _CHOICE_RIDGE, intercept=False)
        kept_P = choose_units(gram.inputs_PP, weight_PK, keep, unit, refitter.choose, used)
        refitter.on.ranks.copy_(kept_P)
        kept_U = kept_P.reshape(keep, unit)[:, 0] // unit
    else:
        kept_P = kept_rows(axis, kept_U, units, sizes)
    name = f"{group.prefix}{writer}.weight"
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    tensors |= cut_units(group, others, kept_U, units, sizes)
    return kept_P


def _log(refitter: Refitter, name: str, fit: Fit) -> None:
    refitter.log.append(
        {
            "name": name,
            "ridge": None if fit.ridge == float("inf") else fit.ridge,
            "error": fit.error,
            "plain_error": fit.plain_error,
            "raised": fit.raised,
        }
    )


def held_back_from(windows: int) -> int:
    """First window that is held back to choose ridges.

    Raises UserError if there is nothing to hold back.
    """
    if windows < 2:
        raise UserError(
            f"The refit needs at least 2 calibration windows, one of them held back, found "
            f"{windows}: raise --samples, or use --no-refit."
        )
    return windows - max(1, windows // _HELD_BACK)
