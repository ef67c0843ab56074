"""The first streaming pass: second moments of the dense stream, and losses before."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm.compression.projection import HeadMoments, norm_of
from sp3llm.compression.statistics import Moments, MomentSum, SiteSlots, pack, unpack
from sp3llm.maths.moments import add_second_moment, normalise
from sp3llm.maths.products import widen
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import Family, Group
from sp3llm.models.head import backward_head, token_losses
from sp3llm.models.hooks import Probe
from sp3llm.models.shapes import Shape
from sp3llm.models.stock import empty_model
from sp3llm.models.stream import Stream, backward_layer, open_stream, probe_stream, run_layer
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import NOTHING_KEPT, Journal
from sp3llm.runtime.memory import trim_memory
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.progress import tracked

# Loss gradients are taken on this many tokens, in whole windows: their moments only weigh
# directions, and every layer's input is kept for them.
_GRADIENT_TOKENS = 8192
# Neighbouring read sites are summed into this many, so that what a basis is made from does not
# grow with depth (eval/NOTES.md: next to nothing is lost).
_SITES = 4


def measure_dense(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    evaluation: Tensor | None,
    moments: str,
    basis: str,
    execution: Execution,
    progress: Progress | None = None,
    journal: Journal = NOTHING_KEPT,
) -> tuple[Moments, Tensor | None]:
    """One streaming pass of the dense model over calibration and evaluation windows.

    `moments` is of which stream (`normalised` or `raw`). With `basis` other than `pca` what an
    error in the stream costs is measured too: `readers`, by the readers' weights, relative to all
    that they read; `gradient`, by the second moments of loss gradients (see
    `_add_gradient_metrics`). What `journal` has from a run before is not done again.

    Returns the moments and the token losses on the evaluation windows.
    """
    finished = journal.latest("moments")
    if finished is not None:
        return unpack(finished.tensors, execution), finished.tensors.get("losses")
    _, *layers, _ = families.groups(family, dense.config)
    shape = Shape.of(family, dense.config)
    count = len(family.sites) * len(layers) + 1
    slots = SiteSlots.of(count, 1 if basis == "pca" else _SITES, shape.hidden_size, execution)
    traced = journal.leading("input")
    passed = journal.latest("forward") if traced == len(layers) + 1 else None
    if passed is not None:
        slots.restore(passed.tensors)
        found, losses = unpack(passed.tensors, execution), passed.tensors.get("losses")
        inputs = [journal.kept("input", index) for index in range(traced)]
    else:
        found, losses, inputs = _forward(
            dense,
            family,
            calibration,
            evaluation,
            moments,
            basis,
            execution,
            progress,
            journal,
            slots,
        )
    if basis == "gradient":
        _add_gradient_metrics(
            dense, family, calibration, execution, progress, journal, inputs, slots
        )
    slots.check_finite()
    found = replace(
        found, sites_DD=tuple(slots.sums), metrics_DD=() if basis == "pca" else tuple(slots.metrics)
    )
    losses_saved = {} if losses is None else {"losses": losses}
    journal.save("moments", 0, {**pack(found), **losses_saved})
    journal.drop("dense", "forward", "gradient", "input")
    trim_memory()
    return found, losses


def _forward(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    evaluation: Tensor | None,
    moments: str,
    basis: str,
    execution: Execution,
    progress: Progress | None,
    journal: Journal,
    slots: SiteSlots,
) -> tuple[Moments, Tensor | None, list[Tensor]]:
    """The forward pass of `measure_dense`: fills `slots` but for metrics of gradients.

    Returns moments, losses, and for gradients every layer's input and the head's.
    """
    eps = families.norm_eps(family, dense.config)
    shape = Shape.of(family, dense.config)
    embeddings, *layers, _ = families.groups(family, dense.config)

    def probe_into(total: MomentSum) -> Probe:
        def probe(_: slice, x: Tensor) -> None:
            total.add(normalise(x, eps, family.centred) if moments == "normalised" else widen(x))

        return probe

    def close(site: int, total: MomentSum, tensors: Mapping[str, Tensor], norm: str,
              readers: list[str]) -> None:  # fmt: skip
        moment_DD = total.moments()[0]
        slots.sums[slots.of_site(site)] += moment_DD
        if basis == "readers":
            metric_DD = _reader_metric(family, tensors, norm, readers, execution)
            cost = (metric_DD * moment_DD).sum()
            # A site where no error costs anything (a block that does nothing yet) has no say.
            if cost > 0:
                slots.metrics[slots.of_site(site)] += metric_DD / cost

    model = empty_model(dense.config)
    table = dense.read(embeddings.parameters)
    before = journal.latest("dense", journal.leading("input") if basis == "gradient" else None)
    start, saved = (0, {}) if before is None else (before.step, before.tensors)
    inputs = [journal.kept("input", index) for index in range(start if basis == "gradient" else 0)]
    local_windows = execution.local_windows(*calibration.shape)
    stream = open_stream(
        model, family, table, calibration[local_windows], execution, saved.get("stream")
    )
    evaluated = None
    if evaluation is not None:
        mine_evaluated = execution.local_windows(*evaluation.shape)
        own = evaluation[mine_evaluated]
        evaluated = open_stream(model, family, table, own, execution, saved.get("evaluated"))
    traced = len(_traced_windows(calibration, execution))
    heads = list(unpack(saved, execution).heads) if saved else []
    if saved:
        slots.restore(saved)
    square = families.is_square(family, dense.config)
    sources = prefetch(layers[start:], lambda group: dense.read(group.parameters), execution.device)
    bar = tracked(progress, "dense model, second moments", sources, start, len(layers))
    for index, (group, tensors) in enumerate(bar, start):
        if basis == "gradient":
            inputs.append(journal.keep("input", index, stream.hidden[:traced]))
        at_sites = [MomentSum.of(1, shape.hidden_size, execution) for _ in family.sites]
        probes = {
            site.norm: probe_into(total) for site, total in zip(family.sites, at_sites, strict=True)
        }
        if square:
            outputs = MomentSum.of(shape.num_attention_heads, shape.head_dim, execution)
            probes[family.writers[0]] = lambda _, a, outputs=outputs: outputs.add(widen(a))
        streams = [(stream, probes)] + ([(evaluated, {})] if evaluated else [])
        run_layer(model, family, index, tensors, streams, execution)
        at_sites = [total.over(execution.ranks) for total in at_sites]
        first = index * len(family.sites)
        if square:
            outputs = outputs.over(execution.ranks)
            heads.append(_head_moments(family, group, tensors, at_sites[0], outputs))
        for number, (site, total) in enumerate(zip(group.sites, at_sites, strict=True)):
            readers = [f"{group.prefix}{reader}.weight" for reader in site.readers]
            norm = f"{group.prefix}{site.norm}"
            close(first + number, total, tensors, norm, readers)
        if journal.due():
            streams_now = {"stream": stream.hidden}
            if evaluated is not None:
                streams_now["evaluated"] = evaluated.hidden
            state = Moments(tuple(slots.sums), tuple(slots.metrics), None, tuple(heads))
            journal.save("dense", index + 1, {**pack(state), **streams_now})
    at_head = MomentSum.of(1, shape.hidden_size, execution)
    probe_stream(stream, probe_into(at_head), execution)
    at_head = at_head.over(execution.ranks)
    head = head_tensors(dense, family)
    last = len(family.sites) * len(layers)
    close(last, at_head, head, family.final_norm, [f"{family.head}.weight"])
    losses = None
    if evaluated is not None:
        own_losses = token_losses(model, family, head, evaluated, own, execution)
        losses = execution.ranks.all_gather_rows(own_losses, mine_evaluated, len(evaluation))
    found = Moments(tuple(slots.sums), tuple(slots.metrics), at_head.moments()[0], tuple(heads))
    if basis == "gradient":
        inputs.append(journal.keep("input", len(layers), stream.hidden[:traced]))
        losses_saved = {} if losses is None else {"losses": losses}
        journal.save("forward", 0, {**pack(found), **losses_saved})
    return found, losses, inputs


def _traced_windows(calibration: Tensor, execution: Execution) -> list[int]:
    """Which windows of this process, its first ones, loss gradients are taken on."""
    local_windows = execution.local_windows(*calibration.shape)
    return local_windows[local_windows < max(1, _GRADIENT_TOKENS // calibration.shape[1])].tolist()


def _head_moments(
    family: Family,
    group: Group,
    tensors: Mapping[str, Tensor],
    reads: MomentSum,
    outputs: MomentSum,
) -> HeadMoments:
    """Moments of a layer's queries and keys, from those of what they read, and of its outputs."""
    mean_HE = outputs.means()
    output_HEE = outputs.moments() - mean_HE[..., :, None] * mean_HE[..., None, :]
    if family.rotary:
        return HeadMoments(output_HEE, mean_HE)
    site = family.sites[0]
    moment_DD, mean_D = reads.moments()[0], reads.means()[0]
    norm_D, shift_D = norm_of(family, f"{group.prefix}{site.norm}", tensors, moment_DD)
    found = []
    for reader in site.readers[:2]:
        weight_QD = tensors[f"{group.prefix}{reader}.weight"].to(moment_DD)
        bias = tensors.get(f"{group.prefix}{reader}.bias")
        constant_Q = torch.zeros_like(weight_QD[:, 0]) if bias is None else bias.to(moment_DD)
        constant_Q = constant_Q if shift_D is None else constant_Q + weight_QD @ shift_D
        weight_HED = (weight_QD * norm_D).reshape(*mean_HE.shape, -1)
        covariance_DD = moment_DD - torch.outer(mean_D, mean_D)
        mean_QE = weight_HED @ mean_D + constant_Q.reshape(mean_HE.shape)
        found.append((weight_HED @ covariance_DD @ weight_HED.mT, mean_QE))
    (query_HEE, query_mean_HE), (key_HEE, _) = found
    query_HEE = query_HEE + query_mean_HE[..., :, None] * query_mean_HE[..., None, :]
    return HeadMoments(output_HEE, mean_HE, query_HEE, key_HEE)


def _reader_metric(
    family: Family,
    tensors: Mapping[str, Tensor],
    norm: str,
    readers: list[str],
    execution: Execution,
) -> Tensor:
    """`A = sum W^T W` over a site's readers, the norm's weight folded in (DESIGN 3.2)."""
    like = torch.empty(0, dtype=torch.float64, device=execution.device)
    norm_D, _ = norm_of(family, norm, tensors, like)
    width = len(norm_D)
    metric_DD = torch.zeros(width, width, dtype=torch.float64, device=execution.device)
    out = tensors.get(f"{family.projections[1]}.weight") if family.projections else None
    for reader in readers:
        matrix_FD = widen(tensors[reader].to(execution.device))
        if out is not None and reader == f"{family.head}.weight":
            matrix_FD = matrix_FD @ out.to(matrix_FD)
        add_second_moment(metric_DD, matrix_FD)
    return norm_D[:, None] * metric_DD * norm_D


def _add_gradient_metrics(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    execution: Execution,
    progress: Progress | None,
    journal: Journal,
    inputs: list[Tensor],
    slots: SiteSlots,
) -> None:
    """Add `A = E[g g^T]`, `g` the gradient of a token's loss by the normalised stream at a site.

    Labels are drawn from the model itself, so that `A` is the Fisher information of the stream,
    and the sum over sites of `tr(A Q C Q) / 2` the loss in nats a token that giving up `Q` costs,
    to second order, errors at different sites and moments within one taken as independent.

    `inputs` are every layer's for the windows traced, and behind them what the head reads.
    """
    embeddings, *layers, _ = families.groups(family, dense.config)
    model = empty_model(dense.config)
    windows = _traced_windows(calibration, execution)
    table = dense.read(embeddings.parameters)
    calls = open_stream(model, family, table, calibration[windows], execution, inputs[-1]).calls
    traced = max(1, _GRADIENT_TOKENS // calibration.shape[1])
    tokens = min(traced, len(calibration)) * calibration.shape[1]

    def add(site: int, gradients: Tensor, norm: str, tensors: Mapping[str, Tensor]) -> None:
        width = gradients.shape[-1]
        total_DD = torch.zeros(width, width, dtype=torch.float64, device=execution.device)
        for window in gradients:
            seen = widen(window.to(execution.device))
            add_second_moment(total_DD, seen * norm_of(family, norm, tensors, seen)[0])
        execution.ranks.all_reduce_(total_DD)
        slots.metrics[slots.of_site(site)] += total_DD / tokens

    before = journal.latest("gradient")
    sites = len(family.sites)
    if before is None:
        head = head_tensors(dense, family)
        final = Stream(inputs[-1], calls)
        upstream, at_norm = backward_head(model, family, head, final, windows, execution)
        add(sites * len(layers), at_norm, family.final_norm, head)
        start = 0
    else:
        start, upstream = before.step, before.tensors["upstream"]
        slots.restore(before.tensors)
    downwards = list(enumerate(layers))[::-1]
    sources = prefetch(
        downwards[start:], lambda pair: dense.read(pair[1].parameters), execution.device
    )
    bar = tracked(progress, "dense model, loss gradients", sources, start, len(layers))
    for done, ((index, group), tensors) in enumerate(bar, start + 1):
        at = Stream(inputs[index], calls)
        norms = [site.norm for site in family.sites]
        upstream, gradients = backward_layer(
            model, family, index, tensors, at, upstream, norms, execution
        )
        for number, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
            add(index * sites + number, gradient, f"{group.prefix}{norm}", tensors)
        if journal.due():
            state = Moments(tuple(slots.sums), tuple(slots.metrics))
            journal.save("gradient", done, {**pack(state), "upstream": upstream})
