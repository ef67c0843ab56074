"""Streaming measurements: what the basis is made from, and the losses before and after."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm import families
from sp3llm.checkpoint import Checkpoint
from sp3llm.errors import UserError
from sp3llm.execution import Execution, Ranks, ahead, give_back
from sp3llm.families import Family, Group
from sp3llm.moments import (
    add_second_moment,
    column_sums,
    eigenbasis,
    mean_free_frame,
    metric_basis,
    normalise,
    spread_mean_free_frame,
    spreading_turn,
    tied_rotation,
    widen,
)
from sp3llm.plan import Shape
from sp3llm.project import HeadMoments, Narrowing, Projection, norm_of
from sp3llm.rebuild import head_tensors
from sp3llm.resume import NOTHING_KEPT, Journal
from sp3llm.stream import (
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

Item = TypeVar("Item")

# Loss gradients are taken on this many tokens, in whole windows: their moments only weigh
# directions, and every layer's input is kept for them.
_GRADIENT_TOKENS = 8192
# What a journal knows the last pass as.
LOSSES = "losses"
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
    head_DD: Tensor | None = None
    """Mean second moment of what the head reads."""
    heads: tuple[HeadMoments, ...] = ()
    """Of every layer, where the width is heads times head size."""

    def total(self) -> Tensor:
        """Sum over all sites, `(D, D)`."""
        return sum(self.sites_DD[1:], self.sites_DD[0].clone())


@dataclass
class _Sum:
    """Second moments and means of vectors, in `B` blocks of `W` channels, as they come."""

    squares_BWW: Tensor
    sums_BW: Tensor
    count: int = 0

    @staticmethod
    def of(blocks: int, width: int, on: Execution) -> "_Sum":
        """Nothing yet."""
        squares_BWW = torch.zeros(blocks, width, width, dtype=torch.float64, device=on.device)
        return _Sum(squares_BWW, torch.zeros_like(squares_BWW[..., 0]))

    def add(self, x: Tensor) -> None:
        """Add `(..., B W)`, float."""
        blocks, width = self.sums_BW.shape
        x_NBW = x.reshape(-1, blocks, width)
        for block, squares_WW in enumerate(self.squares_BWW):
            add_second_moment(squares_WW, x_NBW[:, block])
        self.sums_BW += column_sums(x_NBW.flatten(1)).view(blocks, width)
        self.count += len(x_NBW)

    def over(self, ranks: Ranks) -> "_Sum":
        """The same with what every process has seen."""
        count = self.sums_BW.new_tensor([self.count])
        ranks.add_(self.squares_BWW, self.sums_BW, count)
        return _Sum(self.squares_BWW, self.sums_BW, int(count.item()))

    def moments(self) -> Tensor:
        """Mean second moments, `(B, W, W)`."""
        return self.squares_BWW / self.count

    def means(self) -> Tensor:
        """Means, `(B, W)`."""
        return self.sums_BW / self.count


@dataclass(frozen=True)
class _Slots:
    """Moments and metrics of all read sites, neighbouring ones summed."""

    sums: list[Tensor]
    metrics: list[Tensor]
    sites: int

    @staticmethod
    def of(sites: int, most: int, width: int, on: Execution) -> "_Slots":
        """Nothing yet, in `most` slots or as many as there are sites."""

        def zeros() -> list[Tensor]:
            return [
                torch.zeros(width, width, dtype=torch.float64, device=on.device)
                for _ in range(min(most, sites))
            ]

        return _Slots(zeros(), zeros(), sites)

    def of_site(self, site: int) -> int:
        """The slot that a site is summed into."""
        return site * len(self.sums) // self.sites

    def restore(self, named: Mapping[str, Tensor]) -> None:
        """Take over what `_packed` had."""
        for name, totals in (("sites_DD", self.sums), ("metrics_DD", self.metrics)):
            for index, total_DD in enumerate(totals):
                total_DD.copy_(named[f"{name}.{index}"])

    def check_finite(self) -> None:
        """Raises UserError if anything overflowed."""
        if not all(torch.isfinite(total_DD).all() for total_DD in self.sums):
            raise UserError(
                "The second moments of the stream do not fit float32: its activations are extreme; "
                "use --moments normalised, or a checkpoint in float64."
            )
        if not all(torch.isfinite(metric_DD).all() for metric_DD in self.metrics):
            raise UserError(
                "The gradients of the loss hold NaN or infinity: use --basis readers, or --dtype "
                "float32."
            )


def tracked(
    progress: Progress | None, description: str, items: Iterable[Item], start: int, count: int
) -> Iterator[Item]:
    """The items, number `start` to `count`, with a bar where there is one to show."""
    bar = None if progress is None else progress.add_task(description, total=count, completed=start)
    for item in items:
        yield item
        if bar is not None:
            progress.advance(bar)


def measure_dense(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    evaluation: Tensor | None,
    moments: str,
    basis: str,
    on: Execution,
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
        return _unpacked(finished.tensors, on), finished.tensors.get("losses")
    _, *layers, _ = families.groups(family, dense.config)
    shape = Shape.of(family, dense.config)
    count = len(family.sites) * len(layers) + 1
    slots = _Slots.of(count, 1 if basis == "pca" else _SITES, shape.hidden_size, on)
    traced = journal.leading("input")
    passed = journal.latest("forward") if traced == len(layers) + 1 else None
    if passed is not None:
        slots.restore(passed.tensors)
        found, losses = _unpacked(passed.tensors, on), passed.tensors.get("losses")
        inputs = [journal.kept("input", index) for index in range(traced)]
    else:
        found, losses, inputs = _forward(
            dense, family, calibration, evaluation, moments, basis, on, progress, journal, slots
        )
    if basis == "gradient":
        _add_gradient_metrics(dense, family, calibration, on, progress, journal, inputs, slots)
    slots.check_finite()
    found = replace(
        found, sites_DD=tuple(slots.sums), metrics_DD=() if basis == "pca" else tuple(slots.metrics)
    )
    losses_saved = {} if losses is None else {"losses": losses}
    journal.save("moments", 0, {**_packed(found), **losses_saved})
    journal.drop("dense", "forward", "gradient", "input")
    give_back()
    return found, losses


def _forward(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    evaluation: Tensor | None,
    moments: str,
    basis: str,
    on: Execution,
    progress: Progress | None,
    journal: Journal,
    slots: _Slots,
) -> tuple[Moments, Tensor | None, list[Tensor]]:
    """The forward pass of `measure_dense`: fills `slots` but for metrics of gradients.

    Returns moments, losses, and for gradients every layer's input and the head's.
    """
    eps = families.norm_eps(family, dense.config)
    shape = Shape.of(family, dense.config)
    embeddings, *layers, _ = families.groups(family, dense.config)

    def probe_into(total: _Sum) -> Probe:
        def probe(_: slice, x: Tensor) -> None:
            total.add(normalise(x, eps, family.centred) if moments == "normalised" else widen(x))

        return probe

    def close(site: int, total: _Sum, tensors: Mapping[str, Tensor], norm: str,
              readers: list[str]) -> None:  # fmt: skip
        moment_DD = total.moments()[0].to(on.device)
        slots.sums[slots.of_site(site)] += moment_DD
        if basis == "readers":
            metric_DD = _reader_metric(family, tensors, norm, readers, on)
            cost = (metric_DD * moment_DD).sum()
            # A site where no error costs anything (a block that does nothing yet) has no say.
            if cost > 0:
                slots.metrics[slots.of_site(site)] += metric_DD / cost

    model = empty_model(dense.config)
    table = dense.read(embeddings.parameters)
    before = journal.latest("dense", journal.leading("input") if basis == "gradient" else None)
    start, saved = (0, {}) if before is None else (before.step, before.tensors)
    inputs = [journal.kept("input", index) for index in range(start if basis == "gradient" else 0)]
    mine = on.mine(*calibration.shape)
    stream = open_stream(model, family, table, calibration[mine], on, saved.get("stream"))
    evaluated = None
    if evaluation is not None:
        mine_evaluated = on.mine(*evaluation.shape)
        own = evaluation[mine_evaluated]
        evaluated = open_stream(model, family, table, own, on, saved.get("evaluated"))
    traced = len(_traced_windows(calibration, on))
    heads = list(_unpacked(saved, on).heads) if saved else []
    if saved:
        slots.restore(saved)
    square = families.is_square(family, dense.config)
    sources = ahead(layers[start:], lambda group: dense.read(group.parameters), on, start)
    bar = tracked(progress, "dense model, second moments", sources, start, len(layers))
    for index, (group, tensors) in enumerate(bar, start):
        here = on.turn(index)
        if basis == "gradient":
            inputs.append(journal.keep("input", index, stream.hidden[:traced]))
        at_sites = [_Sum.of(1, shape.hidden_size, here) for _ in family.sites]
        probes = {
            site.norm: probe_into(total) for site, total in zip(family.sites, at_sites, strict=True)
        }
        if square:
            outputs = _Sum.of(shape.num_attention_heads, shape.head_dim, here)
            probes[family.writers[0]] = lambda _, a, outputs=outputs: outputs.add(widen(a))
        streams = [(stream, probes)] + ([(evaluated, {})] if evaluated else [])
        run_layer(model, family, index, tensors, streams, here)
        at_sites = [total.over(on.ranks) for total in at_sites]
        first = index * len(family.sites)
        if square:
            outputs = outputs.over(on.ranks)
            found = _head_moments(family, group, tensors, at_sites[0], outputs)
            heads.append(found.to(on.device))
        for number, (site, total) in enumerate(zip(group.sites, at_sites, strict=True)):
            readers = [f"{group.prefix}{reader}.weight" for reader in site.readers]
            norm = f"{group.prefix}{site.norm}"
            close(first + number, total, tensors, norm, readers)
        if journal.due():
            streams_now = {"stream": stream.hidden}
            if evaluated is not None:
                streams_now["evaluated"] = evaluated.hidden
            state = Moments(tuple(slots.sums), tuple(slots.metrics), None, tuple(heads))
            journal.save("dense", index + 1, {**_packed(state), **streams_now})
    at_head = _Sum.of(1, shape.hidden_size, on)
    probe_stream(stream, probe_into(at_head), on)
    at_head = at_head.over(on.ranks)
    head = head_tensors(dense, family)
    last = len(family.sites) * len(layers)
    close(last, at_head, head, family.final_norm, [f"{family.head}.weight"])
    losses = None
    if evaluated is not None:
        own_losses = token_losses(model, family, head, evaluated, own, on)
        losses = on.ranks.assembled(own_losses, mine_evaluated, len(evaluation))
    found = Moments(tuple(slots.sums), tuple(slots.metrics), at_head.moments()[0], tuple(heads))
    if basis == "gradient":
        inputs.append(journal.keep("input", len(layers), stream.hidden[:traced]))
        losses_saved = {} if losses is None else {"losses": losses}
        journal.save("forward", 0, {**_packed(found), **losses_saved})
    return found, losses, inputs


def _traced_windows(calibration: Tensor, on: Execution) -> list[int]:
    """Which windows of this process, its first ones, loss gradients are taken on."""
    mine = on.mine(*calibration.shape)
    return mine[mine < max(1, _GRADIENT_TOKENS // calibration.shape[1])].tolist()


def _packed(moments: Moments) -> dict[str, Tensor]:
    """Moments as named tensors."""
    named: dict[str, Tensor | None] = {"head": moments.head_DD}
    for name in ("sites_DD", "metrics_DD"):
        named |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(moments, name))}
    for layer, head in enumerate(moments.heads):
        named |= {f"heads.{layer}.{name}": tensor for name, tensor in vars(head).items()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _unpacked(named: Mapping[str, Tensor], on: Execution) -> Moments:
    """What `_packed` had."""

    def of(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}."
        found = {n.removeprefix(start): t for n, t in named.items() if n.startswith(start)}
        return {name: tensor.to(on.device, copy=True) for name, tensor in found.items()}

    def listed(prefix: str) -> tuple[Tensor, ...]:
        found = of(prefix)
        return tuple(found[str(i)] for i in range(len(found)))

    layers = {int(name.split(".")[1]) for name in named if name.startswith("heads.")}
    heads = tuple(HeadMoments(**of(f"heads.{layer}")) for layer in sorted(layers))
    head_DD = named.get("head")
    head_DD = None if head_DD is None else head_DD.to(on.device, copy=True)
    return Moments(listed("sites_DD"), listed("metrics_DD"), head_DD, heads)


def _head_moments(
    family: Family, group: Group, tensors: Mapping[str, Tensor], reads: _Sum, outputs: _Sum
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
    family: Family, tensors: Mapping[str, Tensor], norm: str, readers: list[str], on: Execution
) -> Tensor:
    """`A = sum W^T W` over a site's readers, the norm's weight folded in (DESIGN 3.2)."""
    like = torch.empty(0, dtype=torch.float64, device=on.device)
    norm_D, _ = norm_of(family, norm, tensors, like)
    width = len(norm_D)
    metric_DD = torch.zeros(width, width, dtype=torch.float64, device=on.device)
    out = tensors.get(f"{family.projections[1]}.weight") if family.projections else None
    for reader in readers:
        matrix_FD = widen(tensors[reader].to(on.device))
        if out is not None and reader == f"{family.head}.weight":
            matrix_FD = matrix_FD @ out.to(matrix_FD)
        add_second_moment(metric_DD, matrix_FD)
    return norm_D[:, None] * metric_DD * norm_D


def _add_gradient_metrics(
    dense: Checkpoint,
    family: Family,
    calibration: Tensor,
    on: Execution,
    progress: Progress | None,
    journal: Journal,
    inputs: list[Tensor],
    slots: _Slots,
) -> None:
    """Add `A = E[g g^T]`, `g` the gradient of a token's loss by the normalised stream at a site.

    Labels are drawn from the model itself, so that `A` is the Fisher information of the stream,
    and the sum over sites of `tr(A Q C Q) / 2` the loss in nats a token that giving up `Q` costs,
    to second order, errors at different sites and moments within one taken as independent.

    `inputs` are every layer's for the windows traced, and behind them what the head reads.
    """
    embeddings, *layers, _ = families.groups(family, dense.config)
    model = empty_model(dense.config)
    windows = _traced_windows(calibration, on)
    table = dense.read(embeddings.parameters)
    calls = open_stream(model, family, table, calibration[windows], on, inputs[-1]).calls
    traced = max(1, _GRADIENT_TOKENS // calibration.shape[1])
    tokens = min(traced, len(calibration)) * calibration.shape[1]

    def add(site: int, gradients: Tensor, norm: str, tensors: Mapping[str, Tensor],
            here: Execution) -> None:  # fmt: skip
        width = gradients.shape[-1]
        total_DD = torch.zeros(width, width, dtype=torch.float64, device=here.device)
        for window in gradients:
            seen = widen(window.to(here.device))
            add_second_moment(total_DD, seen * norm_of(family, norm, tensors, seen)[0])
        on.ranks.add_(total_DD)
        slots.metrics[slots.of_site(site)] += (total_DD / tokens).to(on.device)

    before = journal.latest("gradient")
    sites = len(family.sites)
    if before is None:
        head = head_tensors(dense, family)
        final = Stream(inputs[-1], calls)
        upstream, at_norm = backward_head(model, family, head, final, windows, on)
        add(sites * len(layers), at_norm, family.final_norm, head, on)
        start = 0
    else:
        start, upstream = before.step, before.tensors["upstream"]
        slots.restore(before.tensors)
    downwards = list(enumerate(layers))[::-1]
    alone = replace(on, devices=())  # a backward pass over so little text takes no turns
    sources = ahead(downwards[start:], lambda pair: dense.read(pair[1].parameters), alone)
    bar = tracked(progress, "dense model, loss gradients", sources, start, len(layers))
    for done, ((index, group), tensors) in enumerate(bar, start + 1):
        at = Stream(inputs[index], calls)
        norms = [site.norm for site in family.sites]
        upstream, gradients = backward_layer(model, family, index, tensors, at, upstream, norms, on)
        for number, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
            add(index * sites + number, gradient, f"{group.prefix}{norm}", tensors, on)
        if journal.due():
            state = Moments(tuple(slots.sums), tuple(slots.metrics))
            journal.save("gradient", done, {**_packed(state), "upstream": upstream})


def measure_losses(
    checkpoint: Checkpoint,
    family: Family,
    tokens: Tensor,
    on: Execution,
    progress: Progress | None = None,
    journal: Journal = NOTHING_KEPT,
    what: str = "compressed model, perplexity",
) -> Tensor:
    """Token losses of a checkpoint, streamed: `(windows, tokens - 1)`, float64, nats."""
    model = empty_model(checkpoint.config)
    embeddings, *layers, _ = families.groups(family, checkpoint.config)
    mine = on.mine(*tokens.shape)
    own = tokens[mine]
    before = journal.latest(LOSSES)
    start, saved = (0, None) if before is None else (before.step, before.tensors["stream"])
    stream = open_stream(model, family, checkpoint.read(embeddings.parameters), own, on, saved)
    sources = ahead(layers[start:], lambda group: checkpoint.read(group.parameters), on, start)
    bar = tracked(progress, what, sources, start, len(layers))
    for index, (_, tensors) in enumerate(bar, start):
        run_layer(model, family, index, tensors, [(stream, {})], on.turn(index))
        if journal.due():
            journal.save(LOSSES, index + 1, {"stream": stream.hidden})
    losses = token_losses(model, family, head_tensors(checkpoint, family), stream, own, on)
    return on.ranks.assembled(losses, mine, len(tokens))


def choose_basis(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    shape: Shape,
    tokens: Tensor | None = None,
    turn: str = "none",
) -> tuple[Tensor, Projection]:
    """The global basis: top principal components, or the projector of that rank that costs least.

    Under LayerNorm it is taken in the mean-free frame and turned into another one (DESIGN 3.4).

    Returns all eigenvalues of the summed moments, falling, and the projection.
    """
    inside = _inside(family, moments)
    eigenvalues_C, vectors_CC = eigenbasis(inside.total())
    kept = shape.hidden_size - family.centred
    basis_CK = vectors_CC[:, :kept]
    if inside.metrics_DD:
        basis_CK = metric_basis(inside.sites_DD, inside.metrics_DD, vectors_CC, kept)
    basis_DK = _outside(family, basis_CK)
    return eigenvalues_C, projection_of(dense, family, moments, shape, tokens, basis_DK, turn=turn)


def learned_basis(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    shape: Shape,
    tokens: Tensor,
    columns_DK: Tensor,
    gates_K: Tensor | None,
    turn: str = "none",
) -> tuple[Tensor, Projection]:
    """As `choose_basis`, of the columns and gates that a mask has learned."""
    eigenvalues_C, _ = eigenbasis(_inside(family, moments).total())
    return eigenvalues_C, projection_of(
        dense, family, moments, shape, tokens, columns_DK, gates_K, turn
    )


def nested_frame(family: Family, moments: Moments, widths: Sequence[int]) -> Tensor:
    """All coordinates of the stream, those first that a narrower one of `widths` needs too.

    Of each width the subspace that costs least, within that of the next wider one. What a learned
    mask chooses from.

    Returns orthonormal columns, `(D, D)`, or under LayerNorm `(D, D - 1)` and mean-free.
    """
    inside = _inside(family, moments)
    _, frame_CC = eigenbasis(inside.total())
    bands, inner_CW = [], frame_CC
    for width in sorted({width - family.centred for width in widths}, reverse=True):
        if width >= inner_CW.shape[1] or not inside.metrics_DD:
            continue
        within = tuple(
            tuple(inner_CW.T @ one_CC @ inner_CW for one_CC in those_CC)
            for those_CC in (inside.sites_DD, inside.metrics_DD)
        )
        start_WW = torch.eye(inner_CW.shape[1], dtype=inner_CW.dtype, device=inner_CW.device)
        kept_WK = metric_basis(*within, start_WW, width)
        given_up_WR = torch.linalg.qr(kept_WK, mode="complete")[0][:, width:]
        bands.append(inner_CW @ given_up_WR)
        inner_CW = inner_CW @ kept_WK
    return _outside(family, torch.cat([inner_CW, *bands[::-1]], 1))


def projection_of(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    shape: Shape,
    tokens: Tensor | None,
    basis_DK: Tensor,
    gates_K: Tensor | None = None,
    turn: str = "none",
) -> Projection:
    """The projection of a shape along orthonormal columns, `(D, K)`; under LayerNorm `(D, K - 1)`,
    which are turned into another mean-free frame. `turn` is one of `config.TURNS`: `hadamard`
    spreads the energy over the kept channels, where no tie fixes the rotation (3.11).

    For tied models without projections the basis is turned so that the tie holds (DESIGN 3.5),
    which leaves gates of the stream no place: they count as open. Where embeddings keep a width of
    their own, a narrower one gets a basis from the calibration `tokens`.
    """
    gated_DK = None if gates_K is None else basis_DK * gates_K
    turn_KK = None
    if family.centred:
        spread = turn == "hadamard"
        new_frame = spread_mean_free_frame if spread else mean_free_frame
        turn_KK = new_frame(shape.hidden_size, basis_DK.device).T
    elif turn == "hadamard":
        turn_KK = spreading_turn(shape.hidden_size, basis_DK.device)
    if turn_KK is not None:
        basis_DK = basis_DK @ turn_KK
        gated_DK = None if gated_DK is None else gated_DK @ turn_KK
    narrowing = narrowing_of(dense, family, moments, shape)
    tied_scale_K, embedding_EJ = None, None
    if shape.tie_word_embeddings and family.projections is None:
        norm = f"{family.final_norm}.weight"
        norm_D, _ = norm_of(family, family.final_norm, dense.read([norm]), basis_DK)
        basis_DK, tied_scale_K = tied_rotation(basis_DK, norm_D)
        gated_DK = None
    elif shape.tie_word_embeddings:
        embedding_EJ = _embedding_basis(dense, family, moments, shape, tokens, basis_DK)
    return Projection(basis_DK, tied_scale_K, embedding_EJ, gated_DK, narrowing)


def _inside(family: Family, moments: Moments) -> Moments:
    """Moments in the coordinates that a basis is taken in: under LayerNorm the mean-free frame."""
    if not family.centred:
        return moments
    width, device = len(moments.sites_DD[0]), moments.sites_DD[0].device
    frame_DC = mean_free_frame(width, device)

    def inside(those_DD: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(frame_DC.T @ one_DD @ frame_DC for one_DD in those_DD)

    return Moments(inside(moments.sites_DD), inside(moments.metrics_DD))


def _outside(family: Family, basis_CK: Tensor) -> Tensor:
    """Columns in the stream's own coordinates."""
    if not family.centred:
        return basis_CK
    return mean_free_frame(len(basis_CK) + 1, basis_CK.device) @ basis_CK


def narrowing_of(
    dense: Checkpoint, family: Family, moments: Moments, shape: Shape
) -> Narrowing | None:
    """How attention is cut first, in families whose width is heads times head size."""
    if not families.is_square(family, dense.config):
        return None
    groups = Shape.of(family, dense.config).num_key_value_heads
    return Narrowing(moments.heads, groups, shape.num_key_value_heads, shape.head_dim)


def _embedding_basis(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    shape: Shape,
    tokens: Tensor | None,
    basis_DK: Tensor,
) -> Tensor:
    """Embedding coordinates to keep, `(E, J)`: those that stream and head miss least.

    The table has two roles, and an error `Q` in it two costs, each relative to all that the role
    does: `tr(A Q C Q)` with `C` the second moment of the embeddings that `tokens` look up and `A`
    what the stream takes from them, and with `C` that of what the table is multiplied with in the
    end and `A` the table's own moment, free of the mean over the vocabulary, which no softmax
    sees.
    """
    config = dense.config
    width = families.axis_sizes(family, config)[families.EMBEDDING]
    like = basis_DK
    if shape.word_embed_proj_dim == width:
        return torch.eye(width, dtype=like.dtype, device=like.device)
    tensors = head_tensors(dense, family)
    table_VE = tensors[f"{family.head}.weight"].to(like)
    into, out = (f"{module}.weight" for module in family.projections)
    into_ED = torch.eye(width, dtype=like.dtype, device=like.device)
    out_ED = into_ED
    if families.has_projections(family, config):
        into_ED, out_ED = dense.read([into])[into].to(like).T, tensors[out].to(like)
    counts_V = torch.bincount(tokens.flatten(), minlength=len(table_VE)).to(like)
    looked_up_EE = table_VE.T @ (counts_V[:, None] * table_VE)
    taken_EE = into_ED @ basis_DK @ basis_DK.T @ into_ED.T
    norm_D, bias_D = norm_of(family, family.final_norm, tensors, like)
    read_ED = out_ED * norm_D
    given_EE = read_ED @ moments.head_DD.to(like) @ read_ED.T
    if bias_D is not None:
        given_EE = given_EE + torch.outer(out_ED @ bias_D, out_ED @ bias_D)
    centred_VE = table_VE - table_VE.mean(0)
    scored_EE = centred_VE.T @ centred_VE
    pairs = [(taken_EE, looked_up_EE), (scored_EE, given_EE)]
    metrics_EE = tuple(a_EE / (a_EE * c_EE).sum() for a_EE, c_EE in pairs)
    moments_EE = tuple(c_EE for _, c_EE in pairs)
    # Both of these lie in what the table spans, where nothing needs to be given up.
    start_EE = eigenbasis(looked_up_EE / looked_up_EE.trace() + scored_EE / scored_EE.trace())[1]
    return metric_basis(moments_EE, metrics_EE, start_EE, shape.word_embed_proj_dim)
