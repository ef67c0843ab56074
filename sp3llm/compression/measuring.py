"""The first streaming pass: second moments of the dense stream, what its writers lose without some
of their inputs, and losses before.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm.compression.curves import WriterInputs, add_curves, writer_probes
from sp3llm.compression.dense_pass import DensePass
from sp3llm.compression.dense_runs import DenseRuns, recorded
from sp3llm.compression.gradients import measure_gradients
from sp3llm.compression.projection import HeadMoments
from sp3llm.compression.reading import as_read, folded_norm, read_at, real_rows
from sp3llm.compression.statistics import (
    FisherSums,
    Moments,
    MomentSum,
    SiteSlots,
    pack,
    unpack,
)
from sp3llm.maths.moments import add_second_moment
from sp3llm.maths.products import operand, widen
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import Family, Group
from sp3llm.models.hooks import Probe, both_probes
from sp3llm.models.opening import open_stream
from sp3llm.models.shapes import Shape
from sp3llm.models.stream import LayeredModel, Stream, first_tokens, probe_stream, run_layer
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import NOTHING_KEPT, Journal
from sp3llm.runtime.memory import trim_memory
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.progress import tracked
from sp3llm.text.batches import rows_of
from sp3llm.text.examples import Examples

# Neighbouring read sites are summed into this many, so that what a basis is made from does not
# grow with depth (eval/NOTES.md: next to nothing is lost).
_SITES = 4


def measure_dense(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor | Examples,
    evaluation: Tensor | Examples | None,
    moments: str,
    basis: str,
    execution: Execution,
    progress: Progress | None = None,
    journal: Journal = NOTHING_KEPT,
    least_units: Mapping[str, int] | None = None,
    predicts: bool = False,
    original: Checkpoint | None = None,
    gaps: str | None = None,
    runs: DenseRuns | None = None,
    judging: int = 0,
) -> tuple[Moments, Tensor | None]:
    """Stream the dense model over calibration and evaluation windows, and measure it.

    `calibration` and `evaluation` are token ids, `(windows, tokens)`. `moments` is of which stream
    (`normalised` or `raw`). With `basis` other than `pca` what an error in the stream costs is
    measured too: `readers`, by the readers' weights, relative to all that they read; `gradient`,
    by the second moments of loss gradients (`compression.gradients`). For axes in `least_units`,
    along which shapes are cut, it is found out which units of writers go, down to as few as given
    (`compression.curves`), by all of the text and, for trials, without the last `judging` windows;
    where it `predicts`, all that predictions need as well, among it what writers lose without them.
    With `gaps`, `bridged` or
    `cut`, what layers are worth is (`compression.depth`). What `journal` has from a run before is
    not done again. `original` is the checkpoint whose table and head the evaluation windows go
    through, where `dense` has only some of its tokens. What the layers leave of the calibration
    windows is kept in `runs`, unless that is None.

    Returns the moments and the token losses on the evaluation windows, `(windows, tokens - 1)`,
    float64, in nats. Raises UserError where activations, moments or gradients hold NaN or
    infinity.
    """
    depth = len(families.groups(family, dense.config)) - 2
    width = Shape.of(family, dense.config).hidden_size
    sites, most = (
        len(family.sites) * depth + 1,
        1 if basis == "pca" and not predicts else _SITES,
    )
    run = DensePass(
        *(dense, family, calibration, evaluation, moments, basis),
        *(predicts, gaps, least_units or {}, execution, progress, journal),
        slots=SiteSlots.of(sites, most, width, execution),
        fisher=FisherSums.of(sites, most, depth, width, execution),
        original=original or dense,
        runs=runs,
        judging=judging,
    )
    if run.takes_gradients:
        measure_gradients(run)
    finished = journal.latest("moments")
    if finished is not None:
        measured, losses = unpack(finished.tensors, execution), finished.tensors.get("losses")
    else:
        measured, losses = _forward(run)
        run.slots.check_finite()
        named = {} if losses is None else {"losses": losses}
        journal.save("moments", 0, {**pack(measured), **named})
        journal.drop("dense")
        trim_memory()
    return _with_gradients(run, measured), losses


def _with_gradients(run: DensePass, measured: Moments) -> Moments:
    """The moments with what the journal has apart from them: what gradients say."""
    if not run.takes_gradients:
        return measured
    fisher = run.fisher.finished()
    metrics_DD = fisher.sites_DD if run.basis == "gradient" else measured.metrics_DD
    return replace(measured, fisher=fisher, metrics_DD=metrics_DD)


def _forward(run: DensePass) -> tuple[Moments, Tensor | None]:
    """The forward pass of `measure_dense` over all windows; without what gradients say."""
    family, execution, journal, layers = run.family, run.execution, run.journal, run.layers
    before = journal.latest("dense")
    start, saved = (0, {}) if before is None else (before.step, before.tensors)
    model, table = run.model(run.dense), run.embeddings(run.dense)
    local_windows = execution.local_windows(*run.calibration.shape)
    stream = open_stream(model, table, rows_of(run.calibration, local_windows), saved.get("stream"))
    evaluated = None
    if run.evaluation is not None:
        local_evaluation = execution.local_windows(*run.evaluation.shape)
        tokens = rows_of(run.evaluation, local_evaluation)
        whole, all_rows = model, table
        if run.original is not run.dense:
            whole, all_rows = run.model(run.original), run.embeddings(run.original)
        evaluated = open_stream(whole, all_rows, tokens, saved.get("evaluated"))
    so_far = unpack(saved, execution)
    heads, curves = list(so_far.heads), dict(so_far.curves)
    dropped = [] if so_far.dropped_OLG is None else list(so_far.dropped_OLG.unbind(1))
    if saved:
        run.slots.restore(saved)
    sources = prefetch(
        layers[start:], lambda group: run.dense.read(group.parameters), execution.device
    )

    bar = tracked(run.progress, "dense model, second moments", sources, start, len(layers))
    for index, (group, tensors) in enumerate(bar, start):
        layer, streams = (index, group, tensors), (stream, evaluated)
        heads += _measure_layer(run, model, layer, streams, curves, dropped)
        if journal.due():
            streams_now = {"stream": stream.hidden}
            if evaluated is not None:
                streams_now["evaluated"] = evaluated.hidden
            sums, metrics = tuple(run.slots.sums), tuple(run.slots.metrics)
            state = Moments(
                *(sums, metrics), heads=tuple(heads), curves=curves, dropped_OLG=_by_layer(dropped)
            )
            journal.save("dense", index + 1, {**pack(state), **streams_now})
    head = head_tensors(run.dense, family)
    head_DD = _measure_head(run, stream, head)
    losses = None
    if evaluated is not None:
        if run.original is not run.dense:
            head = head_tensors(run.original, family)
        own_losses = run.objective.losses(whole, head, evaluated, tokens)
        losses = execution.ranks.all_gather_rows(own_losses, local_evaluation, len(run.evaluation))
        run.objective.merit(losses)  # refuses now what has none, not when all work is done
    measured = Moments(
        sites_DD=tuple(run.slots.sums),
        metrics_DD=tuple(run.slots.metrics) if run.basis == "readers" else (),
        head_DD=head_DD,
        heads=tuple(heads),
        layers_L=run.fisher.layers_L if run.gaps is not None else None,
        curves=curves,
        dropped_OLG=_by_layer(dropped),
    )
    return measured, losses


def _by_layer(dropped: list[Tensor]) -> Tensor | None:
    """Neurons that go, of the layers so far, `(O, L, G)`; None: none do."""
    return torch.stack(dropped, 1) if dropped else None


def _measure_layer(
    run: DensePass,
    model: LayeredModel,
    layer: tuple[int, Group, Mapping[str, Tensor]],
    streams: tuple[Stream, Stream | None],
    curves: dict[str, Tensor],
    dropped: list[Tensor],
) -> list[HeadMoments]:
    """Send both streams, of calibration and evaluation, through a layer, given by number, group and
    weights; add the moments at its sites to the slots, what its writers lose to the curves, and the
    neurons that go to those of the layers before.

    Returns the moments of its attention, where the width is heads times head size; else nothing.
    """
    (index, group, tensors), family, execution = layer, run.family, run.execution
    (stream, evaluated), inputs = streams, WriterInputs.of(run, group)
    at_sites = [MomentSum.of(1, run.shape.hidden_size, execution) for _ in family.sites]
    probes = {
        read_at(family, site): _moment_probe(run, stream, total)
        for site, total in zip(family.sites, at_sites, strict=True)
    }
    is_square = families.is_square(family, run.dense.config)
    if is_square:
        outputs = MomentSum.of(run.shape.num_attention_heads, run.shape.head_dim, execution)
        probes[family.writers[0]] = lambda rows, a: outputs.add(
            real_rows(operand(a), stream.real, rows)
        )
    probes = both_probes(probes, writer_probes(run, stream, inputs))
    streams = [(evaluated, {})] if evaluated else []
    if run.runs is None:
        run_layer(model, index, tensors, [(stream, probes), *streams])
    else:
        with recorded(model, run.dense.config, index, stream, keeps=True) as (kept, keepers):
            both = both_probes(probes, keepers)
            run_layer(model, index, tensors, [(stream, both), *streams])
        run.runs[index] = kept
    at_sites = [total.over(execution.ranks) for total in at_sites]
    heads = []
    if is_square:
        summed = outputs.over(execution.ranks)
        heads.append(_head_moments(family, group, tensors, at_sites[0], summed))
    dropped_OG = add_curves(run, layer, inputs, heads, curves)
    if dropped_OG is not None:
        dropped.append(dropped_OG)
    for number, (site, total) in enumerate(zip(group.sites, at_sites, strict=True)):
        readers = [f"{group.prefix}{reader}.weight" for reader in site.readers]
        norm = f"{group.prefix}{site.norm}"
        metric_DD = _reader_metric(run, tensors, norm, readers)
        _add_site(run, index * len(family.sites) + number, _moment(run, total), metric_DD)
    return heads


def _measure_head(run: DensePass, stream: Stream, head: Mapping[str, Tensor]) -> Tensor:
    """Add the moment of what the final norm reads to the slots; that moment, `(D, D)`."""
    task_head = run.family.task_head
    norm, reader = run.family.final_norm, run.family.head
    if task_head is not None:
        norm, reader = "", task_head.reader
        if task_head.first_only:
            stream = first_tokens(stream)
    total = MomentSum.of(1, run.shape.hidden_size, run.execution)
    probe_stream(stream, _moment_probe(run, stream, total), run.execution)
    moment_DD = _moment(run, total.over(run.execution.ranks))
    metric_DD = _reader_metric(run, head, norm, [f"{reader}.weight"] if reader else [])
    _add_site(run, len(run.family.sites) * len(run.layers), moment_DD, metric_DD)
    return moment_DD


def _moment(run: DensePass, total: MomentSum) -> Tensor:
    """The second moment that a basis is made from, `(D, D)`: in a post-norm family, whose readers
    all have biases, and norms too, that around the mean, which costs nothing.
    """
    moment_DD, mean_D = total.moments()[0], total.means()[0]
    return moment_DD - torch.outer(mean_D, mean_D) if run.family.post_norm else moment_DD


def _moment_probe(run: DensePass, stream: Stream, total: MomentSum) -> Probe:
    """A probe that adds a stream, as it is read or as it is, to a sum of moments."""
    eps = families.norm_eps(run.family, run.dense.config)
    is_normalised = run.moments == "normalised"

    def probe(rows: slice, x: Tensor) -> None:
        x = real_rows(operand(x), stream.real, rows)
        total.add(as_read(run.family, eps, x).to(x.dtype) if is_normalised else x)

    return probe


def _add_site(run: DensePass, site: int, moment_DD: Tensor, metric_DD: Tensor | None) -> None:
    """Add a site's mean second moment to its slot, and its readers' metric, if there is one,
    relative to all that they read.
    """
    slot = run.slots.of_site(site)
    run.slots.sums[slot] += moment_DD
    if metric_DD is not None:
        cost = (metric_DD * moment_DD).sum()
        # A site where no error costs anything (a block that does nothing yet) has no say.
        if cost > 0:
            run.slots.metrics[slot] += metric_DD / cost


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
    norm_D, shift_D = folded_norm(family, f"{group.prefix}{site.norm}", tensors, moment_DD)
    of_readers = []
    for reader in site.readers[:2]:
        weight_QD = tensors[f"{group.prefix}{reader}.weight"].to(moment_DD)
        bias = tensors.get(f"{group.prefix}{reader}.bias")
        constant_Q = torch.zeros_like(weight_QD[:, 0]) if bias is None else bias.to(moment_DD)
        constant_Q = constant_Q if shift_D is None else constant_Q + weight_QD @ shift_D
        weight_HED = (weight_QD * norm_D).reshape(*mean_HE.shape, -1)
        covariance_DD = moment_DD - torch.outer(mean_D, mean_D)
        mean_QE = weight_HED @ mean_D + constant_Q.reshape(mean_HE.shape)
        of_readers.append((weight_HED @ covariance_DD @ weight_HED.mT, mean_QE))
    (query_HEE, query_mean_HE), (key_HEE, _) = of_readers
    query_HEE = query_HEE + query_mean_HE[..., :, None] * query_mean_HE[..., None, :]
    return HeadMoments(output_HEE, mean_HE, query_HEE, key_HEE)


def _reader_metric(
    run: DensePass, tensors: Mapping[str, Tensor], norm: str, readers: list[str]
) -> Tensor | None:
    """`A = sum W^T W` over a site's readers, the norm's weight folded in (docs/design.md 3.2);
    None where the basis does not ask for it.
    """
    if run.basis != "readers":
        return None
    family, device = run.family, run.execution.device
    width = run.shape.hidden_size
    norm_D = torch.ones(width, dtype=torch.float64, device=device)
    if not family.post_norm:
        norm_D, _ = folded_norm(family, norm, tensors, norm_D)
    metric_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
    out = tensors.get(f"{family.projections[1]}.weight") if family.projections else None
    for reader in readers:
        matrix_FD = widen(tensors[reader].to(device))
        if out is not None and reader == f"{family.head}.weight":
            matrix_FD = matrix_FD @ out.to(matrix_FD)
        add_second_moment(metric_DD, matrix_FD)
    return norm_D[:, None] * metric_DD * norm_D
