"""Which inputs writers can do without, and what they lose without them, in nats a token: both
measured in the pass over the dense model.

A writer that some of its inputs are taken from is refitted on the others. What it then misses of
its own output follows from the second moment of its inputs alone, and what that costs from the
Fisher information of the stream behind it (`compression.gradients`): one greedy pass of
`maths.unit_selection.drop_units` says in which order units go, and gives the whole curve of units
against nats. Curves of all layers add up, since every layer keeps the same number.

Where the stream keeps its width, the FFN neurons that go are those, and all that is built
afterwards is built without them. Chosen beside each layer's refit instead, on the small model's own
inputs, they suit the text that is fitted to better and other text less (eval/NOTES.md), and
everything runs with all of them until then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sp3llm.compression.dense_pass import DensePass
from sp3llm.compression.projecting import unit_sizes
from sp3llm.compression.projection import HeadMoments
from sp3llm.compression.reading import real_rows
from sp3llm.compression.refitter import solves_in
from sp3llm.compression.units import gated_writers
from sp3llm.errors import UserError
from sp3llm.maths.heads import query_key_errors, value_output_errors
from sp3llm.maths.moments import add_second_moment, root_mean_square
from sp3llm.maths.products import operand, widened
from sp3llm.maths.refit import gram_of_writer, ridged_factor
from sp3llm.maths.ridge import sketch_of
from sp3llm.maths.unit_selection import drop_units
from sp3llm.models import families
from sp3llm.models.families import Group
from sp3llm.models.hooks import Probe, both_probes
from sp3llm.models.stream import OUTPUT, Stream
from sp3llm.text.batches import real_tokens

# Tokens that the second moment of a writer's inputs is taken on, for each of the inputs.
_TOKENS_AN_INPUT = 16
# Relative to the mean diagonal: of the inputs' second moment, by which units are chosen; and of the
# Fisher information, which is of fewer tokens than a wide stream has channels.
_INPUT_RIDGE, _FISHER_RIDGE = 1e-4, 1e-6


@dataclass
class WriterInputs:
    """Running second moments of what a layer's writers read, each token relative to the stream
    behind the writer; of the first of the calibration windows.
    """

    squares_PP: dict[int, Tensor]
    """By writer; of those that have curves."""
    windows: int
    """How many of this process's windows are looked at."""
    before: int
    """How many of them stand before those that tell what shapes lose."""
    neurons: int | None
    """The FFN's writer, where some of all processes' windows tell that, and neurons go."""
    tokens: int = 0
    """Seen of each writer so far, all of them together."""
    before_PP: Tensor | None = None
    """What the sum of the FFN's writer was before the windows that tell, in host memory."""
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """By writer: what it reads in the batch that is running."""

    @staticmethod
    def of(run: DensePass, group: Group) -> "WriterInputs":
        """Of no tokens yet."""
        sizes = families.axis_sizes(run.family, run.dense.config)
        writers = list(enumerate(gated_writers(run.family, group)))
        widths = {
            number: sizes[axis]
            for number, (_, axis) in writers
            if axis in run.least_units
            or (axis == families.QUERY and families.HEAD_DIM in run.least_units)
        }
        squares_PP = {
            number: torch.zeros(width, width, dtype=torch.float64, device=run.execution.device)
            for number, width in widths.items()
        }
        tokens = _TOKENS_AN_INPUT * max(widths.values(), default=0)
        count = -(-tokens * len(run.calibration) // real_tokens(run.calibration))
        first_judging, neurons = len(run.calibration) - run.judging, None
        if min(count, len(run.calibration)) > first_judging and families.FFN in run.least_units:
            neurons = next((number for number, (_, axis) in writers if axis == families.FFN), None)
        windows, before = (len(run.first_windows(few)) for few in (count, first_judging))
        return WriterInputs(squares_PP, windows, before, neurons)

    def add(self, number: int, relative: Tensor, stream: Stream, start: int) -> None:
        """Add what a writer reads in windows from `start` on, `(windows, tokens, P)`."""
        end = start + len(relative)
        for first, last in ((start, min(end, self.before)), (max(start, self.before), end)):
            if first >= last:
                continue
            if number == self.neurons and first >= self.before:
                self.without_judging()
            part = relative[first - start : last - start]
            tokens_NP = real_rows(part, stream.real, slice(first, last))
            add_second_moment(self.squares_PP[number], tokens_NP)
            self.tokens += tokens_NP[..., 0].numel()

    def without_judging(self) -> Tensor:
        """The sum of the FFN's writer without the windows that tell: what it is when this is first
        asked for, at the first of these, or of a process that has none at the end.
        """
        if self.before_PP is None:
            self.before_PP = self.squares_PP[self.neurons].to("cpu", copy=True)
        return self.before_PP


def writer_probes(run: DensePass, stream: Stream, inputs: WriterInputs) -> dict[str, Probe]:
    """Probes of `models.stream.run_layer`, of a stream, that add what the writers of a layer read
    to `inputs`.
    """
    family = run.family
    behind = [OUTPUT] * len(family.writers)
    if family.post_norm:
        behind = [site.norm for site in family.sites]
    elif not families.is_parallel(family, run.dense.config):
        behind = [*(site.norm for site in family.sites[1:]), OUTPUT]

    def reads(number: int) -> Probe:
        def probe(rows: slice, a: Tensor) -> None:
            if rows.start < inputs.windows:
                inputs.waiting[number] = a[: inputs.windows - rows.start]

        return probe

    def ends(number: int) -> Probe:
        def probe(rows: slice, x: Tensor) -> None:
            if number in inputs.waiting:
                a = operand(inputs.waiting.pop(number))
                x = x.reshape(-1, *a.shape[1:2], x.shape[-1])[: len(a)]
                # Widened first: of two dtypes a CPU divides a tenth as fast.
                relative = widened(a).div_(root_mean_square(x, family.centred)).to(a.dtype)
                inputs.add(number, relative, stream, rows.start)

        return probe

    probes: dict[str, Probe] = {}
    for number in inputs.squares_PP:
        for pair in ({behind[number]: ends(number)}, {family.writers[number]: reads(number)}):
            probes = both_probes(probes, pair)
    return probes


def add_curves(
    run: DensePass,
    layer: tuple[int, Group, Mapping[str, Tensor]],
    inputs: WriterInputs,
    heads: list[HeadMoments],
    curves: dict[str, Tensor],
) -> Tensor | None:
    """Add what the writers of a layer lose, given by its number, group and weights, to the curves
    of all layers, by axis (`statistics.Moments.curves`). `heads` are its attention's moments, where
    the width is heads times head size.

    Returns the FFN neurons that go, as `statistics.Moments` has them of a layer, `(O, G)`, int64;
    None: none is to go.
    """
    (index, group, tensors), family, ranks = layer, run.family, run.execution.ranks
    multiplier = families.residual_multiplier(family, run.dense.config)
    writers, fisher, dropped_OG = gated_writers(family, group), run.fisher.finished(), None
    for number, square_PP in inputs.squares_PP.items():
        if not torch.isfinite(square_PP).all():
            raise UserError(
                f"The squares of what {group.prefix}{writers[number][0]} reads in the dense model "
                "hold NaN or infinity: its activations are extreme; use a checkpoint whose weights "
                "are scaled as usual, or fix the shape with --allocate width."
            )
        tokens, before_PP = square_PP.new_tensor([inputs.tokens / len(inputs.squares_PP)]), None
        if number == inputs.neurons:
            before_PP = inputs.without_judging()  # while the sum is this process's own
        ranks.all_reduce_(square_PP, tokens)
        square_PP /= tokens
        writer, axis = writers[number]
        weight_DP = multiplier * tensors[f"{group.prefix}{writer}.weight"].to(square_PP)
        weight_PS = None
        if run.predicts:
            place = index * len(family.writers) + number
            metric_DD = fisher.behind(place, len(family.writers) * len(run.layers))
            weight_PS = _in_nats(metric_DD, weight_DP)
        found = {}
        if axis in run.least_units:
            gone_G, curve = _dropped(run, axis, square_PP, weight_DP.T, weight_PS)
            if axis == families.FFN:
                dropped_OG = gone_G[None]
                if before_PP is not None:
                    before_PP = before_PP.to(square_PP)
                    ranks.all_reduce_(before_PP)
                    in_trials_G, _ = _dropped(run, axis, before_PP, weight_DP.T, None)
                    dropped_OG = torch.stack([gone_G, in_trials_G])
                ranks.broadcast_(dropped_OG)
            if curve is not None:
                found[axis] = curve
        if axis == families.QUERY and families.HEAD_DIM in run.least_units:
            found[families.HEAD_DIM] = _head_size_curve(run, square_PP, weight_PS, heads[0])
        for name, curve in found.items():
            ranks.broadcast_(curve)
            before = curves.get(name)
            curves[name] = curve if before is None else _sum(before, curve)
    return dropped_OG


def _in_nats(metric_DD: Tensor, weight_DP: Tensor) -> Tensor:
    """A writer's matrix, `(P, S)`, whose outputs are such that half the square of an error in them
    is what it costs; where there are many, random combinations of them.
    """
    root_DD, _, _ = ridged_factor(metric_DD, _FISHER_RIDGE)
    sketch_DS = sketch_of(root_DD)
    return weight_DP.T @ (root_DD if sketch_DS is None else root_DD @ sketch_DS)


def _head_size_curve(
    run: DensePass, square_PP: Tensor, weight_PS: Tensor, moments: HeadMoments
) -> Tensor:
    """Dimensions of a head and nats, of one layer whose heads are projected (`maths.heads`).

    Of values the error is known. One in the scores moves weight among the values that a query
    sees: by as much, relative to what it could move, as the error's mean square, or all of it.
    """
    heads, full = moments.mean_HE.shape
    blocks_HEE = (
        square_PP.reshape(heads, full, heads, full).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )
    writer_HSE = weight_PS.T.reshape(-1, heads, full).permute(1, 0, 2)
    values_HE = value_output_errors(blocks_HEE, writer_HSE)
    scores_HE = query_key_errors(moments.query_HEE, moments.key_HEE) / full
    whole_H1 = ((writer_HSE @ blocks_HEE) * writer_HSE).sum((1, 2))[:, None]
    lost_E = (values_HE + scores_HE.clamp_max(1) * whole_H1).sum(0) / 2
    left_E = torch.arange(full, 0, -1).to(lost_E)
    return torch.stack([left_E, lost_E], 1)


def _dropped(
    run: DensePass, axis: str, square_PP: Tensor, weight_PD: Tensor, weight_PS: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Units of a writer in the order in which they go, as the refit would have it, by the error of
    all outputs alike; and, with its matrix in nats, `_in_nats`, units and nats from all of them
    down, `(points, 2)`.
    """
    unit = unit_sizes(run.shape, axis)[axis]
    judging = weight_PD.shape[1]
    weight_PQ = weight_PD if weight_PS is None else torch.cat([weight_PD, weight_PS], 1)
    gram = gram_of_writer(square_PP, weight_PQ)
    settings = (run.least_units[axis], unit, _INPUT_RIDGE, solves_in(run.execution), judging)
    rounds = list(drop_units(gram, weight_PQ, *settings))
    gone_G = torch.cat([gone_U for gone_U, _ in rounds])
    if weight_PS is None:
        return gone_G, None
    left = len(square_PP) // unit
    points = [(left, 0.0)]
    for gone_U, grown_Q in rounds:
        left -= len(gone_U)
        points.append((left, grown_Q[judging:].sum().item() / 2))
    return gone_G, square_PP.new_tensor(points)


def _sum(one: Tensor, two: Tensor) -> Tensor:
    """Two curves of the same numbers of units, added up."""
    return torch.stack([one[:, 0], one[:, 1] + two[:, 1]], 1)
