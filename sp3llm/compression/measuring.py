"""The first streaming pass: second moments of the dense stream, and losses before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm.compression.projection import HeadMoments, norm_of
from sp3llm.compression.statistics import Moments, MomentSum, SiteSlots, pack, unpack
from sp3llm.maths.moments import add_second_moment, normalise
from sp3llm.maths.products import operand, widen
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import Family, Group
from sp3llm.models.hooks import Probe
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.objectives.schema import Objective
from sp3llm.models.shapes import Shape
from sp3llm.models.stream import (
    LayeredModel,
    Stream,
    backward_layer,
    open_stream,
    probe_stream,
    run_layer,
)
from sp3llm.planning.needs import gradient_windows
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import NOTHING_KEPT, Journal
from sp3llm.runtime.memory import trim_memory
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.progress import tracked

# Neighbouring read sites are summed into this many, so that what a basis is made from does not
# grow with depth (eval/NOTES.md: next to nothing is lost).
_SITES = 4


@dataclass(frozen=True)
class _DensePass:
    """One pass over the dense model: what `measure_dense` is asked for, and what it adds up."""

    dense: Checkpoint
    family: Family
    calibration: Tensor
    evaluation: Tensor | None
    moments: str
    basis: str
    execution: Execution
    progress: Progress | None
    journal: Journal
    slots: SiteSlots
    """Moments and metrics of all sites so far, added to in place."""

    @property
    def layers(self) -> list[Group]:
        """Groups of all layers."""
        return families.groups(self.family, self.dense.config)[1:-1]

    @property
    def shape(self) -> Shape:
        """The dense model's."""
        return Shape.of(self.family, self.dense.config)

    @property
    def takes_gradients(self) -> bool:
        """Whether loss gradients are taken, for which every layer's input is kept."""
        return self.basis == "gradient"

    def model(self) -> LayeredModel:
        """The dense model, without weights."""
        return LayeredModel.of(self.dense.config, self.family, self.objective, self.execution)

    @property
    def objective(self) -> Objective:
        """What the model is for."""
        return objective_of(self.family.architecture)

    def embeddings(self) -> Mapping[str, Tensor]:
        """The dense model's embedding tables."""
        group = families.groups(self.family, self.dense.config)[0]
        return self.dense.read(group.parameters)

    def traced_windows(self) -> list[int]:
        """Which windows of this process, its first ones, loss gradients are taken on."""
        local_windows = self.execution.local_windows(*self.calibration.shape)
        traced = gradient_windows(self.calibration.shape[1])
        return local_windows[local_windows < traced].tolist()


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

    `calibration` and `evaluation` are token ids, `(windows, tokens)`. `moments` is of which stream
    (`normalised` or `raw`). With `basis` other than `pca` what an error in the stream costs is
    measured too: `readers`, by the readers' weights, relative to all that they read; `gradient`,
    by the second moments of loss gradients (see `_add_gradient_metrics`). What `journal` has from
    a run before is not done again.

    Returns the moments and the token losses on the evaluation windows, `(windows, tokens - 1)`,
    float64, in nats. Raises UserError where activations, moments or gradients hold NaN or
    infinity.
    """
    finished = journal.latest("moments")
    if finished is not None:
        return unpack(finished.tensors, execution), finished.tensors.get("losses")
    depth = len(families.groups(family, dense.config)) - 2
    width = Shape.of(family, dense.config).hidden_size
    sites, most = len(family.sites) * depth + 1, 1 if basis == "pca" else _SITES
    slots = SiteSlots.of(sites, most, width, execution)
    run = _DensePass(
        dense, family, calibration, evaluation, moments, basis, execution, progress, journal, slots
    )
    measured, losses, inputs = _forward_once(run)
    if run.takes_gradients:
        _add_gradient_metrics(run, inputs)
    slots.check_finite()
    metrics_DD = () if basis == "pca" else tuple(slots.metrics)
    measured = replace(measured, sites_DD=tuple(slots.sums), metrics_DD=metrics_DD)
    journal.save("moments", 0, _packed_with(measured, losses))
    journal.drop("dense", "forward", "gradient", "input")
    trim_memory()
    return measured, losses


def _packed_with(moments: Moments, losses: Tensor | None) -> dict[str, Tensor]:
    """Moments and losses as the journal keeps them."""
    return {**pack(moments), **({} if losses is None else {"losses": losses})}


def _forward_once(run: _DensePass) -> tuple[Moments, Tensor | None, list[Tensor]]:
    """`_forward`, or what it returned in a run before."""
    journal = run.journal
    kept_inputs = journal.leading("input")
    passed = journal.latest("forward") if kept_inputs == len(run.layers) + 1 else None
    if passed is None:
        return _forward(run)
    run.slots.restore(passed.tensors)
    inputs = [journal.kept("input", index) for index in range(kept_inputs)]
    return unpack(passed.tensors, run.execution), passed.tensors.get("losses"), inputs


def _forward(run: _DensePass) -> tuple[Moments, Tensor | None, list[Tensor]]:
    """The forward pass of `measure_dense`: fills `run.slots` but for metrics of gradients.

    Returns moments, losses, and for gradients every layer's input and the head's.
    """
    family, execution, journal, layers = run.family, run.execution, run.journal, run.layers
    before = journal.latest("dense", journal.leading("input") if run.takes_gradients else None)
    start, saved = (0, {}) if before is None else (before.step, before.tensors)
    inputs = [journal.kept("input", index) for index in range(start if run.takes_gradients else 0)]
    model, table = run.model(), run.embeddings()
    local_windows = execution.local_windows(*run.calibration.shape)
    stream = open_stream(model, table, run.calibration[local_windows], saved.get("stream"))
    evaluated = None
    if run.evaluation is not None:
        local_evaluation = execution.local_windows(*run.evaluation.shape)
        tokens = run.evaluation[local_evaluation]
        evaluated = open_stream(model, table, tokens, saved.get("evaluated"))
    traced = len(run.traced_windows())
    heads = list(unpack(saved, execution).heads) if saved else []
    if saved:
        run.slots.restore(saved)
    sources = prefetch(
        layers[start:], lambda group: run.dense.read(group.parameters), execution.device
    )
    bar = tracked(run.progress, "dense model, second moments", sources, start, len(layers))
    for index, (group, tensors) in enumerate(bar, start):
        if run.takes_gradients:
            inputs.append(journal.keep("input", index, stream.hidden[:traced]))
        heads += _measure_layer(run, model, (index, group, tensors), stream, evaluated)
        if journal.due():
            streams_now = {"stream": stream.hidden}
            if evaluated is not None:
                streams_now["evaluated"] = evaluated.hidden
            state = Moments(tuple(run.slots.sums), tuple(run.slots.metrics), None, tuple(heads))
            journal.save("dense", index + 1, {**pack(state), **streams_now})
    head = head_tensors(run.dense, family)
    head_DD = _measure_head(run, stream, head)
    losses = None
    if evaluated is not None:
        own_losses = run.objective.losses(model, head, evaluated, tokens)
        losses = execution.ranks.all_gather_rows(own_losses, local_evaluation, len(run.evaluation))
    measured = Moments(tuple(run.slots.sums), tuple(run.slots.metrics), head_DD, tuple(heads))
    if run.takes_gradients:
        inputs.append(journal.keep("input", len(layers), stream.hidden[:traced]))
        journal.save("forward", 0, _packed_with(measured, losses))
    return measured, losses, inputs


def _measure_layer(
    run: _DensePass,
    model: LayeredModel,
    layer: tuple[int, Group, Mapping[str, Tensor]],
    stream: Stream,
    evaluated: Stream | None,
) -> list[HeadMoments]:
    """Send both streams through a layer, given by number, group and weights, and add the moments
    at its sites to the slots.

    Returns the moments of its attention, where the width is heads times head size; else nothing.
    """
    (index, group, tensors), family, execution = layer, run.family, run.execution
    at_sites = [MomentSum.of(1, run.shape.hidden_size, execution) for _ in family.sites]
    probes = {
        site.norm: _moment_probe(run, total)
        for site, total in zip(family.sites, at_sites, strict=True)
    }
    is_square = families.is_square(family, run.dense.config)
    if is_square:
        outputs = MomentSum.of(run.shape.num_attention_heads, run.shape.head_dim, execution)
        probes[family.writers[0]] = lambda _, a: outputs.add(operand(a))
    streams = [(stream, probes)] + ([(evaluated, {})] if evaluated else [])
    run_layer(model, index, tensors, streams)
    at_sites = [total.over(execution.ranks) for total in at_sites]
    heads = []
    if is_square:
        summed = outputs.over(execution.ranks)
        heads.append(_head_moments(family, group, tensors, at_sites[0], summed))
    for number, (site, total) in enumerate(zip(group.sites, at_sites, strict=True)):
        readers = [f"{group.prefix}{reader}.weight" for reader in site.readers]
        norm = f"{group.prefix}{site.norm}"
        metric_DD = _reader_metric(run, tensors, norm, readers)
        _add_site(run, index * len(family.sites) + number, total.moments()[0], metric_DD)
    return heads


def _measure_head(run: _DensePass, stream: Stream, head: Mapping[str, Tensor]) -> Tensor:
    """Add the moment of what the final norm reads to the slots; that moment, `(D, D)`."""
    total = MomentSum.of(1, run.shape.hidden_size, run.execution)
    probe_stream(stream, _moment_probe(run, total), run.execution)
    moment_DD = total.over(run.execution.ranks).moments()[0]
    metric_DD = _reader_metric(run, head, run.family.final_norm, [f"{run.family.head}.weight"])
    _add_site(run, len(run.family.sites) * len(run.layers), moment_DD, metric_DD)
    return moment_DD


def _moment_probe(run: _DensePass, total: MomentSum) -> Probe:
    """A probe that adds the stream, normalised or as it is, to a sum of moments."""
    eps = families.norm_eps(run.family, run.dense.config)
    is_normalised = run.moments == "normalised"

    def probe(_: slice, x: Tensor) -> None:
        x = operand(x)
        total.add(normalise(x, eps, run.family.centred).to(x.dtype) if is_normalised else x)

    return probe


def _add_site(run: _DensePass, site: int, moment_DD: Tensor, metric_DD: Tensor | None) -> None:
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
    norm_D, shift_D = norm_of(family, f"{group.prefix}{site.norm}", tensors, moment_DD)
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
    run: _DensePass, tensors: Mapping[str, Tensor], norm: str, readers: list[str]
) -> Tensor | None:
    """`A = sum W^T W` over a site's readers, the norm's weight folded in (docs/design.md 3.2);
    None where the basis does not ask for it.
    """
    if run.basis != "readers":
        return None
    family, device = run.family, run.execution.device
    norm_D, _ = norm_of(family, norm, tensors, torch.empty(0, dtype=torch.float64, device=device))
    metric_DD = torch.zeros(len(norm_D), len(norm_D), dtype=torch.float64, device=device)
    out = tensors.get(f"{family.projections[1]}.weight") if family.projections else None
    for reader in readers:
        matrix_FD = widen(tensors[reader].to(device))
        if out is not None and reader == f"{family.head}.weight":
            matrix_FD = matrix_FD @ out.to(matrix_FD)
        add_second_moment(metric_DD, matrix_FD)
    return norm_D[:, None] * metric_DD * norm_D


def _add_gradient_metrics(run: _DensePass, inputs: list[Tensor]) -> None:
    """Add `A = E[g g^T]`, `g` the gradient of a token's loss by the normalised stream at a site.

    Labels are drawn from the model itself, so that `A` is the Fisher information of the stream,
    and the sum over sites of `tr(A Q C Q) / 2` the loss in nats a token that giving up `Q` costs,
    to second order, errors at different sites and moments within one taken as independent.

    `inputs` are every layer's for the windows traced, and behind them what the head reads.
    """
    family, journal, layers, slots = run.family, run.journal, run.layers, run.slots
    model, windows, sites = run.model(), run.traced_windows(), len(run.family.sites)
    calls = open_stream(model, run.embeddings(), run.calibration[windows], inputs[-1]).calls
    before = journal.latest("gradient")
    if before is None:
        head = head_tensors(run.dense, family)
        final = Stream(inputs[-1], calls)
        upstream, at_norm = run.objective.loss_gradients(model, head, final, windows)
        _add_gradients(run, sites * len(layers), at_norm, family.final_norm, head)
        start = 0
    else:
        start, upstream = before.step, before.tensors["upstream"]
        slots.restore(before.tensors)
    downwards = list(enumerate(layers))[::-1]
    sources = prefetch(
        downwards[start:], lambda pair: run.dense.read(pair[1].parameters), run.execution.device
    )
    bar = tracked(run.progress, "dense model, loss gradients", sources, start, len(layers))
    for done, ((index, group), tensors) in enumerate(bar, start + 1):
        layer_input = Stream(inputs[index], calls)
        norms = [site.norm for site in family.sites]
        upstream, at_norms = backward_layer(model, index, tensors, layer_input, upstream, norms)
        for number, (gradients, norm) in enumerate(zip(at_norms, norms, strict=True)):
            _add_gradients(run, index * sites + number, gradients, f"{group.prefix}{norm}", tensors)
        if journal.due():
            state = Moments(tuple(slots.sums), tuple(slots.metrics))
            journal.save("gradient", done, {**pack(state), "upstream": upstream})


def _add_gradients(
    run: _DensePass, site: int, gradients: Tensor, norm: str, tensors: Mapping[str, Tensor]
) -> None:
    """Add a site's mean `g g^T` to its slot, from gradients by the norm's output, `(windows,
    tokens, D)`: those by its input, normalised, are the norm's weight times that.
    """
    width, sequence = gradients.shape[-1], run.calibration.shape[1]
    total_DD = torch.zeros(width, width, dtype=torch.float64, device=run.execution.device)
    for window in gradients:
        by_output = operand(window.to(run.execution.device))
        norm_D, _ = norm_of(run.family, norm, tensors, widen(by_output))
        add_second_moment(total_DD, (by_output * norm_D).to(by_output.dtype))
    run.execution.ranks.all_reduce_(total_DD)
    tokens = min(gradient_windows(sequence), len(run.calibration)) * sequence
    run.slots.metrics[run.slots.of_site(site)] += total_DD / tokens
