"""Streaming measurements: what the basis is made from, and the losses before and after."""

from collections.abc import Iterable, Iterator, Mapping
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

# Loss gradients are taken on this many tokens, in whole windows: their moments only weigh
# directions, and every layer's input is kept for them.
_GRADIENT_TOKENS = 8192
# Neighbouring read sites are summed into this many, so that what a basis is made from does not
# grow with depth (eval/NOTES.md: next to nothing is lost).
_SITES = 4


@dataclass(frozen=True)
class Moments:
    """Second moments of the dense stream, float64."""

    sites_DD: tuple[Tensor, ...]
    """Mean second moments, summed over neighbouring read sites; in the order of the stream."""
    metrics_DD: tuple[Tensor, ...] = ()
    """What an error in the normalised stream costs there; nothing for principal components."""

    def total(self) -> Tensor:
        """Sum over all sites, `(D, D)`."""
        return sum(self.sites_DD[1:], self.sites_DD[0].clone())


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

    `moments` is of which stream (`normalised` or `raw`). With `basis` other than `pca` what an
    error in the stream costs is measured too: `readers`, by the readers' weights, relative to all
    that they read; `gradient`, by the second moments of loss gradients (see `_gradient_metrics`).

    Returns the moments and the token losses on the evaluation windows.
    """
    eps = families.setting(family, dense.config, "rms_norm_eps")
    width = families.axis_sizes(family, dense.config)[families.RESIDUAL]
    embeddings, *layers, _ = families.groups(family, dense.config)
    count = len(family.sites) * len(layers) + 1
    slots = 1 if basis == "pca" else min(_SITES, count)

    def zeros() -> Tensor:
        return torch.zeros(width, width, dtype=torch.float64, device=on.device)

    sums, metrics = [zeros() for _ in range(slots)], [zeros() for _ in range(slots)]

    def probe_into(moment_DD: Tensor) -> Probe:
        def probe(_: slice, x: Tensor) -> None:
            add_second_moment(moment_DD, normalise(x, eps) if moments == "normalised" else widen(x))

        return probe

    def close(site: int, moment_DD: Tensor, tensors: Mapping[str, Tensor], norm: str,
              readers: list[str]) -> None:  # fmt: skip
        moment_DD /= calibration.numel()
        sums[site * slots // count] += moment_DD
        if basis == "readers":
            metric_DD = _reader_metric(tensors, norm, readers, on)
            cost = (metric_DD * moment_DD).sum()
            # A site where no error costs anything (a block that does nothing yet) has no say.
            if cost > 0:
                metrics[site * slots // count] += metric_DD / cost

    model = empty_model(dense.config)
    table = dense.read(embeddings.parameters)
    stream = open_stream(model, family, table, calibration, on)
    evaluated = None if evaluation is None else open_stream(model, family, table, evaluation, on)
    windows = max(1, _GRADIENT_TOKENS // calibration.shape[1])
    inputs: list[Tensor] = []
    for index, group in enumerate(tracked(progress, "dense model, second moments", layers)):
        if basis == "gradient":
            inputs.append(stream.hidden[:windows].clone())
        at_sites = [zeros() for _ in family.sites]
        probes = {
            site.norm: probe_into(moment_DD)
            for site, moment_DD in zip(family.sites, at_sites, strict=True)
        }
        streams = [(stream, probes)] + ([(evaluated, {})] if evaluated else [])
        tensors = dense.read(group.parameters)
        run_layer(model, family, index, tensors, streams, on)
        first = index * len(family.sites)
        for number, (site, moment_DD) in enumerate(zip(family.sites, at_sites, strict=True)):
            readers = [f"{group.prefix}{reader}.weight" for reader in site.readers]
            norm = f"{group.prefix}{site.norm}.weight"
            close(first + number, moment_DD, tensors, norm, readers)
    at_head = zeros()
    probe_stream(stream, probe_into(at_head), on)
    head = head_tensors(dense, family)
    close(count - 1, at_head, head, f"{family.final_norm}.weight", [f"{family.head}.weight"])
    losses = None
    if evaluated is not None:
        losses = token_losses(model, family, head, evaluated, evaluation, on)
    if not all(torch.isfinite(total).all() for total in sums):
        raise UserError(
            "The second moments of the stream do not fit float32: its activations are extreme; "
            "use --moments normalised, or a checkpoint in float64."
        )
    if basis == "pca":
        return Moments(tuple(sums)), losses
    if basis == "gradient":
        final = Stream(stream.hidden[:windows], stream.calls)
        costs = _gradient_metrics(dense, family, inputs, final, on, progress)
        for site, metric_DD in enumerate(costs):
            metrics[(count - 1 - site) * slots // count] += metric_DD
    if not all(torch.isfinite(metric_DD).all() for metric_DD in metrics):
        raise UserError(
            "The gradients of the loss hold NaN or infinity: use --basis readers, or --dtype "
            "float32."
        )
    return Moments(tuple(sums), tuple(metrics)), losses


def head_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Tensor]:
    """Final norm and head; a tied head's table under the head's own name."""
    *_, head = families.groups(family, checkpoint.config)
    tensors = checkpoint.read(head.parameters)
    if families.is_tied(family, checkpoint.config):
        table = checkpoint.read([family.embedding])[family.embedding]
        tensors[f"{family.head}.weight"] = table
    return tensors


def _reader_metric(
    tensors: Mapping[str, Tensor], norm: str, readers: list[str], on: Execution
) -> Tensor:
    """`A = sum W^T W` over a site's readers, the norm's weight folded in (DESIGN 3.2)."""
    norm_D = tensors[norm].to(on.device, torch.float64)
    metric_DD = torch.zeros(len(norm_D), len(norm_D), dtype=torch.float64, device=on.device)
    for reader in readers:
        add_second_moment(metric_DD, widen(tensors[reader].to(on.device)))
    return norm_D[:, None] * metric_DD * norm_D


def _gradient_metrics(
    dense: Checkpoint,
    family: Family,
    inputs: list[Tensor],
    final: Stream,
    on: Execution,
    progress: Progress | None,
) -> Iterator[Tensor]:
    """`A = E[g g^T]` with `g` the gradient of a token's loss by the normalised stream at a site.

    Labels are drawn from the model itself, so that `A` is the Fisher information of the stream,
    and the sum over sites of `tr(A Q C Q) / 2` the loss in nats a token that giving up `Q` costs,
    to second order, errors at different sites and moments within one taken as independent.

    Yields one matrix a site, from the head down.
    """
    _, *layers, _ = families.groups(family, dense.config)
    model = empty_model(dense.config)
    width = final.hidden.shape[-1]

    def metric(gradients: Tensor, norm: Tensor) -> Tensor:
        total_DD = torch.zeros(width, width, dtype=torch.float64, device=on.device)
        add_second_moment(total_DD, widen(gradients.to(on.device)) * norm.to(on.device).float())
        return total_DD / final.hidden[..., 0].numel()

    head = head_tensors(dense, family)
    upstream, at_norm = backward_head(model, family, head, final, on)
    yield metric(at_norm, head[f"{family.final_norm}.weight"])
    pairs = list(enumerate(layers))[::-1]
    bar = tracked(progress, "dense model, loss gradients", [group for _, group in pairs])
    for (index, _), group in zip(pairs, bar, strict=True):
        tensors = dense.read(group.parameters)
        at = Stream(inputs[index], final.calls)
        norms = [site.norm for site in family.sites]
        upstream, gradients = backward_layer(model, family, index, tensors, at, upstream, norms, on)
        weights = [tensors[f"{group.prefix}{norm}.weight"] for norm in norms]
        for gradient, weight in zip(gradients[::-1], weights[::-1], strict=True):
            yield metric(gradient, weight)


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
    eigenvalues_D, vectors_DD = eigenbasis(moments.total())
    basis_DK, tied_scale_K = vectors_DD[:, :hidden_size], None
    if moments.metrics_DD:
        basis_DK = metric_basis(moments.sites_DD, moments.metrics_DD, vectors_DD, hidden_size)
    if families.is_tied(family, dense.config):
        norm = f"{family.final_norm}.weight"
        norm_weight_D = dense.read([norm])[norm].to(basis_DK)
        basis_DK, tied_scale_K = tied_rotation(basis_DK, norm_weight_D)
    return eigenvalues_D, Projection(basis_DK, tied_scale_K)
