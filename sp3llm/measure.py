"""Streaming measurements: what the basis is made from, and the losses before and after."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm import families
from sp3llm.checkpoint import Checkpoint
from sp3llm.errors import UserError
from sp3llm.families import Family, Group
from sp3llm.moments import (
    add_second_moment,
    eigenbasis,
    metric_basis,
    normalise,
    tied_rotation,
    widen,
)
from sp3llm.rebuild import Projection
from sp3llm.stream import (
    Execution,
    Probe,
    Stream,
    backward_head,
    backward_layer,
    empty_model,
    open_stream,
    probe_stream,
    run_layer,
    token_losses,
)

# Loss gradients are taken on this many windows: their moments only weigh directions.
_GRADIENT_WINDOWS = 16


@dataclass(frozen=True)
class Moments:
    """Second moments of the dense stream at its read sites, float64."""

    total_DD: Tensor
    """Sum over sites of the mean second moment."""
    sites_DD: tuple[Tensor, ...] = ()
    """Each site's own, where the basis needs them; in the order of the stream, the head last."""
    metrics_DD: tuple[Tensor, ...] = ()
    """What an error in the normalised stream costs at each site."""


def tracked(progress: Progress | None, description: str, items: list[Group]) -> Iterable[Group]:
    """The items, with a bar where there is one to show."""
    return items if progress is None else progress.track(items, description=description)


def measure_dense(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    evaluation: Tensor | None,
    moments: str,
    basis: str,
    on: Execution,
    progress: Progress | None = None,
) -> tuple[Moments, Tensor | None]:
    """One streaming pass of the dense model over calibration and evaluation windows.

    `moments` is of which stream (`normalised` or `raw`); with `basis` other than `pca` every site
    keeps its own, with what an error there costs: `readers`, by the readers' weights,
    `gradient`, by the loss gradients.

    Returns the moments and the token losses on the evaluation windows.
    """
    eps = families.setting(family, dense.config, "rms_norm_eps")
    width = families.axis_sizes(family, dense.config)[families.RESIDUAL]
    embeddings, *layers, _ = families.groups(family, dense.config)
    count = len(family.sites) * len(layers) + 1
    kept = count if basis != "pca" else 1
    sums = [torch.zeros(width, width, dtype=torch.float64, device=on.device) for _ in range(kept)]

    def probe_of(site: int) -> Probe:
        def probe(_: slice, x: Tensor) -> None:
            seen = normalise(x, eps) if moments == "normalised" else widen(x)
            add_second_moment(sums[site % kept], seen)

        return probe

    model = empty_model(dense.config)
    table = dense.read(embeddings.parameters)
    stream = open_stream(model, family, table, calibration, on)
    evaluated = None if evaluation is None else open_stream(model, family, table, evaluation, on)
    inputs: list[Tensor] = []
    for index, group in enumerate(tracked(progress, "dense model, second moments", layers)):
        first = index * len(family.sites)
        probes = {site.norm: probe_of(first + i) for i, site in enumerate(family.sites)}
        if basis == "gradient":
            inputs.append(stream.hidden[:_GRADIENT_WINDOWS].clone())
        streams = [(stream, probes)] + ([(evaluated, {})] if evaluated else [])
        run_layer(model, family, index, dense.read(group.parameters), streams, on)
    probe_stream(stream, probe_of(count - 1), on)
    losses = None
    if evaluated is not None:
        head = head_tensors(dense, family)
        losses = token_losses(model, family, head, evaluated, evaluation, on)
    total_DD = torch.zeros_like(sums[0])
    for site_DD in sums:
        site_DD /= calibration.numel()
        total_DD += site_DD
    if not all(torch.isfinite(total).all() for total in sums):
        raise UserError(
            "The second moments of the stream do not fit float32: its activations are extreme; "
            "use --moments normalised, or a checkpoint in float64."
        )
    if basis == "pca":
        return Moments(total_DD), losses
    if basis == "readers":
        metrics = _reader_metrics(dense, family, on)
    else:
        final = Stream(stream.hidden[:_GRADIENT_WINDOWS], stream.calls)
        metrics = _gradient_metrics(dense, family, inputs, final, stream, on, progress)
    return Moments(total_DD, tuple(sums), tuple(metrics)), losses


def head_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Tensor]:
    """Final norm and head; a tied head's table under the head's own name."""
    *_, head = families.groups(family, checkpoint.config)
    tensors = checkpoint.read(head.parameters)
    if families.is_tied(family, checkpoint.config):
        table = checkpoint.read([family.embedding])[family.embedding]
        tensors[f"{family.head}.weight"] = table
    return tensors


def _site_readers(
    dense: Checkpoint, family: Family
) -> Iterable[tuple[Mapping[str, Tensor], str, list[str]]]:
    """Each site's tensors, norm and readers, in the order of the stream, the head last."""
    _, *layers, _ = families.groups(family, dense.config)
    for group in layers:
        tensors = dense.read(group.parameters)
        for site in family.sites:
            readers = [f"{group.prefix}{reader}.weight" for reader in site.readers]
            yield tensors, f"{group.prefix}{site.norm}.weight", readers
    yield head_tensors(dense, family), f"{family.final_norm}.weight", [f"{family.head}.weight"]


def _reader_metrics(dense: Checkpoint, family: Family, on: Execution) -> list[Tensor]:
    """`A = sum W^T W` over each site's readers, the norm's weight folded in (DESIGN 3.2)."""
    metrics = []
    for tensors, norm, readers in _site_readers(dense, family):
        norm_D = tensors[norm].to(on.device, torch.float64)
        metric_DD = torch.zeros(len(norm_D), len(norm_D), dtype=torch.float64, device=on.device)
        for reader in readers:
            add_second_moment(metric_DD, widen(tensors[reader].to(on.device)))
        metrics.append(norm_D[:, None] * metric_DD * norm_D)
    return metrics


def _gradient_metrics(
    dense: Checkpoint,
    family: Family,
    inputs: list[Tensor],
    final: Stream,
    stream: Stream,
    on: Execution,
    progress: Progress | None,
) -> list[Tensor]:
    """`A = E[g g^T]` with `g` the gradient of the loss by the normalised stream at each site.

    Labels are drawn from the model itself, so that `A` is the Fisher information of the stream.
    """
    _, *layers, _ = families.groups(family, dense.config)
    model = empty_model(dense.config)
    width = final.hidden.shape[-1]

    def metric(gradients: Tensor, norm: Tensor) -> Tensor:
        total_DD = torch.zeros(width, width, dtype=torch.float64, device=on.device)
        add_second_moment(total_DD, widen(gradients.to(on.device)) * norm.to(on.device).float())
        return total_DD

    head = head_tensors(dense, family)
    upstream, at_norm = backward_head(model, family, head, final, on)
    found = [metric(at_norm, head[f"{family.final_norm}.weight"])]
    pairs = list(enumerate(layers))[::-1]
    bar = tracked(progress, "dense model, loss gradients", [group for _, group in pairs])
    for (index, _), group in zip(pairs, bar, strict=True):
        tensors = dense.read(group.parameters)
        at = Stream(inputs[index], stream.calls)
        norms = [site.norm for site in family.sites]
        upstream, gradients = backward_layer(model, family, index, tensors, at, upstream, norms, on)
        weights = [tensors[f"{group.prefix}{norm}.weight"] for norm in norms]
        found += [metric(g, w) for g, w in zip(gradients[::-1], weights[::-1], strict=True)]
    return found[::-1]


def measure_losses(
    checkpoint: Checkpoint,
    family: Family,
    tokens: Tensor,
    on: Execution,
    progress: Progress | None = None,
) -> Tensor:
    """Token losses of a checkpoint, streamed: `(windows, tokens - 1)`, float64, nats."""
    model = empty_model(checkpoint.config)
    embeddings, *layers, _ = families.groups(family, checkpoint.config)
    stream = open_stream(model, family, checkpoint.read(embeddings.parameters), tokens, on)
    for index, group in enumerate(tracked(progress, "compressed model, perplexity", layers)):
        run_layer(model, family, index, checkpoint.read(group.parameters), [(stream, {})], on)
    return token_losses(model, family, head_tensors(checkpoint, family), stream, tokens, on)


def choose_basis(
    dense: Checkpoint, family: Family, moments: Moments, hidden_size: int
) -> tuple[Tensor, Projection]:
    """The global basis: top principal components, or the rank-K projector that costs least.

    For tied models the basis is turned so that the tie holds. Returns all eigenvalues of the
    summed moments, falling, and the projection.
    """
    eigenvalues_D, vectors_DD = eigenbasis(moments.total_DD)
    basis_DK, tied_scale_K = vectors_DD[:, :hidden_size], None
    if moments.metrics_DD:
        basis_DK = metric_basis(moments.sites_DD, moments.metrics_DD, basis_DK)
    if families.is_tied(family, dense.config):
        norm = f"{family.final_norm}.weight"
        norm_weight_D = dense.read([norm])[norm].to(basis_DK)
        basis_DK, tied_scale_K = tied_rotation(basis_DK, norm_weight_D)
    return eigenvalues_D, Projection(basis_DK, tied_scale_K)
