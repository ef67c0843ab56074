"""Learn what to keep: SP3's masks (arXiv 2308.16475, DESIGN 3.9), by gates on a frozen model.

The story, top-down:

1. turn the stream into a frame of nested subspaces, and put a gate on every coordinate of it, on
   every neuron of the FFN and on every KV group (`gated`);
2. for some hundred steps, draw the gates, ask the dense model, which is the same one without
   gates, and descend the divergence from it; a Lagrangian keeps what is expected to stay open on
   a target, which falls linearly to the budget, and at the same number in every layer;
3. take the shape within the budget that is nearest to what stayed open, and spend the steps that
   are left at exactly its sizes;
4. take the gates that are open most: the winners.

The multipliers are solved for in every step and not ascended: within a few hundred steps ascent
lags, then overshoots, and a model that has lost its sense has no gradient that leads back
(eval/NOTES.md).

Only gates are learned. What is left of the weights is refitted in closed form afterwards, from
those of the dense model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm import mask, training
from sp3llm.checkpoint import Checkpoint
from sp3llm.distill import divergence
from sp3llm.errors import UserError
from sp3llm.execution import Execution, give_back
from sp3llm.families import Family, is_square
from sp3llm.gated import GatedModel, load_frozen
from sp3llm.mask import Gates
from sp3llm.plan import Limits, Shape, cost_of, learnable, nearest
from sp3llm.project import Winners
from sp3llm.resume import Journal

# As a journal knows the steps, and what came out.
_STEPS, _LEARNED = "mask", "learned"
# Log-alphas begin where 98 gates of 100 are open, and stay within reach of the other end: in all
# steps together they could move by _WAY.
_START, _BOUND, _WAY = 2.5, 4.0, 40.0
# The target reaches the budget after this part of the steps; then the shape is fixed.
_FALL = 0.6
# Corrections after a step, each to first order, until no constraint is violated by more than this.
_CORRECTIONS, _MET = 20, 1e-3
# A gradient is kept for as many of a batch's tokens at once as of a streamed batch, by this factor.
_TOKENS_OF_A_BATCH = 1 / 4


@dataclass(frozen=True)
class Learned:
    """A learned mask."""

    frame_DC: Tensor
    """The coordinates that stream gates are about."""
    log_alpha: Gates
    shape: Shape
    """The plan that the winners make."""
    expected: dict[str, float]
    """Sizes that were expected to stay open in the end, by field of a shape."""
    history: list[dict[str, float]]
    """Step, target, expected share of the budget's count, divergence; some of them."""

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        gates = self.log_alpha.map(mask.settled).named()
        undecided = {n: ((g > 0) & (g < 1)).double().mean().item() for n, g in gates.items()}
        return {"expected": self.expected, "undecided": undecided, "history": self.history}

    def stream(self) -> tuple[Tensor, Tensor | None]:
        """Winning coordinates of the stream as columns, `(D, K)` (under LayerNorm `(D, K - 1)`),
        and their gates.
        """
        width, coordinates = self.frame_DC.shape
        keep = self.shape.hidden_size - (width - coordinates)
        score_C = self.log_alpha.stream_C
        if score_C is None:
            return self.frame_DC[:, :keep], None
        kept_K = mask.winners(score_C, keep).to(self.frame_DC.device)
        gates_K = mask.folded(mask.settled(score_C)).to(self.frame_DC)[kept_K]
        return self.frame_DC[:, kept_K], gates_K

    def winners(self) -> Winners:
        """Winning neurons and groups of every layer, with their gates."""

        def of(score_LU: Tensor | None, keep: int) -> Tensor | None:
            if score_LU is None:
                return None
            gates_LU = torch.zeros_like(score_LU, dtype=torch.float64)
            for score_U, gates_U in zip(score_LU, gates_LU, strict=True):
                kept_U = mask.winners(score_U, keep)
                gates_U[kept_U] = mask.folded(mask.settled(score_U[kept_U].double()))
            return gates_LU.to(self.frame_DC.device)

        return Winners(
            of(self.log_alpha.neurons_LF, self.shape.intermediate_size),
            of(self.log_alpha.groups_LG, self.shape.num_key_value_heads),
        )


@dataclass(frozen=True)
class Budget:
    """What may go, what it counts, and what is demanded of it."""

    dense: Shape
    shapes: list[Shape]
    """To choose from in the end."""
    keep: float
    """Share of the dense count that the largest of them has."""
    cost: Callable[[dict[str, Tensor]], Tensor]
    """Share of it that expected sizes make, by field of a shape; those of the dense model where
    none is given."""
    square: bool
    """The width is heads times head size."""

    def varies(self, name: str) -> bool:
        """Whether any candidate is smaller there."""
        return any(getattr(shape, name) != getattr(self.dense, name) for shape in self.shapes)

    def fixed(self, name: str) -> int | None:
        """The size that all candidates have."""
        sizes = {getattr(shape, name) for shape in self.shapes}
        return sizes.pop() if len(sizes) == 1 else None

    def learns_groups(self) -> bool:
        """Whether KV groups go whole."""
        return self.varies("num_key_value_heads")

    def target(self, fallen: float) -> float:
        """What is to be left when the target has `fallen` from all there is to the budget."""
        # More than 1 where a narrower stream brings projections that the dense model has not.
        start = self.cost(self._sizes(0.0)).item()
        if self.is_fixed():
            return self.cost(self._sizes(fallen)).item()
        return start + fallen * (self.keep - start)

    def is_fixed(self) -> bool:
        """Whether there is nothing to trade."""
        return len(set(self.shapes)) == 1

    def _sizes(self, fallen: float) -> dict[str, Tensor]:
        """Those of the dense model, on the way to what is fixed."""
        found = {}
        for name in _SIZES:
            whole = getattr(self.dense, name)
            size = whole + fallen * ((self.fixed(name) or whole) - whole)
            found[name] = torch.tensor(size, dtype=torch.float64)
        return found

    def violated(self, opened: Gates, fallen: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What is over the target, `(E,)`, and the expected sizes."""
        dense, sizes = self.dense, {}
        per_layer = (opened.neurons_LF, opened.groups_LG)
        if opened.stream_C is not None:
            # Under LayerNorm the stream has a coordinate more, which no gate is on.
            missing = dense.hidden_size - len(opened.stream_C)
            sizes["hidden_size"] = opened.stream_C.sum() + missing
        for name, open_LU in zip(_UNITS, per_layer, strict=True):
            if open_LU is not None:
                sizes[name] = open_LU.sum(1).mean()
        found = []
        if not self.is_fixed():
            found.append((self.cost(sizes) - self.target(fallen))[None])
        found += [mask.unevenness(open_LU) for open_LU in per_layer if open_LU is not None]
        for name, size in sizes.items():
            if self.fixed(name) is not None:
                over = (size - self._sizes(fallen)[name]) / getattr(dense, name)
                found.append(over[None])
        in_step = self.square and self.fixed("num_key_value_heads") is None
        if in_step and "num_key_value_heads" in sizes:
            groups = sizes["num_key_value_heads"] / dense.num_key_value_heads
            found.append((groups - sizes["hidden_size"] / dense.hidden_size)[None])
        return torch.cat(found), sizes


_UNITS = ("intermediate_size", "num_key_value_heads")
_SIZES = ("hidden_size", *_UNITS)


def budget_of(
    family: Family, config: Mapping[str, Any], limits: Limits, candidates: list[Shape]
) -> Budget:
    """What a mask may take of a model, by the candidates of its plan."""
    shapes, dense = learnable(family, config, candidates), Shape.of(family, config)
    square = limits.square or is_square(family, config)
    base = dense if shapes[0].tie_word_embeddings == dense.tie_word_embeddings else dense.untied()
    if family.projections and base.tie_word_embeddings:
        base = replace(base, word_embed_proj_dim=shapes[0].word_embed_proj_dim)
    shrinks = any(shape.head_dim != dense.head_dim for shape in shapes)
    unit = dense.num_attention_heads
    if square and not shrinks:  # a width is a number of groups
        unit = dense.hidden_size // dense.num_key_value_heads
    names = [
        name
        for name in _SIZES
        if len({getattr(shape, name) for shape in (dense, *shapes)}) > 1
        and not (square and name == "num_key_value_heads")
    ]
    steps = {"hidden_size": unit, "intermediate_size": 1, "num_key_value_heads": 1}
    # A count is of second degree in the width at most, where heads go with it, of first in others.
    # The class has projections around a table only where it is not as wide as the stream.
    table = base.word_embed_proj_dim if base.tie_word_embeddings else None
    nodes = [
        _spread(steps[name], getattr(dense, name), table if name == "hidden_size" else None)
        for name in names
    ]

    def shape_at(point: tuple[int, ...]) -> Shape:
        sizes = dict(zip(names, point, strict=True))
        width = sizes.get("hidden_size", dense.hidden_size)
        groups = sizes.get("num_key_value_heads", dense.num_key_value_heads)
        if square and not shrinks:
            groups = dense.num_key_value_heads * width // dense.hidden_size
        found = base.with_groups(groups).with_width(width)
        if shrinks:
            found = replace(found, head_dim=width // dense.num_attention_heads)
        if not found.tie_word_embeddings:
            found = found.untied()
        ffn = sizes.get("intermediate_size", dense.intermediate_size)
        return replace(found, intermediate_size=ffn)

    def count(shape: Shape) -> int:
        return cost_of(family, config, shape, limits.context, limits.itemsize).of(limits.of)

    whole = count(dense)
    values = {point: count(shape_at(point)) / whole for point in _grid(nodes)}

    def cost(sizes: dict[str, Tensor]) -> Tensor:
        whole = {name: torch.tensor(float(getattr(dense, name))) for name in names}
        return mask.interpolated(nodes, values, [{**whole, **sizes}[name] for name in names])

    return Budget(dense, shapes, max(map(count, shapes)) / whole, cost, square)


def _spread(step: int, most: int, but: int | None) -> list[int]:
    """Three sizes up to `most`, or as many as there are, all multiples of `step`, far from one
    another, none of them `but`.
    """
    sizes = [size for size in range(step, most + 1, step) if size != but]
    return sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})


def _grid(nodes: list[list[int]]) -> list[tuple[int, ...]]:
    import itertools

    return list(itertools.product(*nodes))


def learn(
    dense: Checkpoint,
    family: Family,
    folder: Path,
    budget: Budget,
    frame_of: Callable[[list[int]], Tensor],
    tokens: Tensor,
    batch: int,
    steps: int,
    seed: int,
    on: Execution,
    progress: Progress | None,
    journal: Journal,
) -> Learned:
    """Learn a mask on `tokens`, `(windows, tokens)`, in `steps` of `batch` windows over all
    processes. `frame_of` widths are all coordinates of the stream, `(D, C)`, those first that the
    narrower of the widths need too.

    What `journal` has of it is not done again. Raises UserError if the divergence is no number.
    """
    before = journal.latest(_LEARNED)
    if before is not None:
        facts, tensors = dict(before.facts), dict(before.tensors)
        frame_DC = tensors.pop("frame").to(on.device)
        return Learned(frame_DC, Gates(**tensors), Shape(**facts.pop("shape")), **facts)
    run = _begin(dense, family, folder, budget, frame_of, tokens, batch, steps, seed, on, journal)
    bar = None if progress is None else progress.add_task("learned mask", total=steps)
    turn = int(_FALL * steps)
    for step in range(run.done, steps):
        if step == turn:
            run = _at_one_shape(run, frame_of)
        entry = _step(run, step)
        if not math.isfinite(entry["divergence"]):
            raise UserError(
                f"Expected a finite divergence at step {step + 1} of the learned mask, found "
                f"{entry['divergence']}: use --dtype float32, or --mask closed-form."
            )
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            run.history.append(entry)
        if progress is not None:
            what = f"learned mask, keeps {100 * entry['expected']:.1f} %"
            progress.update(bar, completed=step + 1, description=what)
        if step + 1 < steps and journal.due():
            _save(run, step + 1, journal)
    found = Learned(
        run.frame_DC, _detached(run.log_alpha), run.budget.shapes[0], run.expected, run.history
    )
    facts = {"shape": vars(found.shape), "expected": run.expected, "history": run.history}
    journal.save(_LEARNED, 0, {**found.log_alpha.named(), "frame": run.frame_DC}, facts)
    journal.drop(_STEPS)
    del run
    give_back()
    return found


@dataclass(frozen=True)
class _Run:
    """Everything that changes, and what it is changed by."""

    gated: GatedModel
    frame_DC: Tensor
    budget: Budget
    log_alpha: Gates
    optimizer: torch.optim.Adam
    expected: dict[str, float]
    """Sizes that were open when the shape was fixed; nothing before."""
    history: list[dict[str, float]]
    tokens: Tensor
    batch: int
    steps: int
    seed: int
    on: Execution
    done: int = 0
    """Steps taken by a run before."""


def _begin(
    dense: Checkpoint,
    family: Family,
    folder: Path,
    budget: Budget,
    frame_of: Callable[[list[int]], Tensor],
    tokens: Tensor,
    batch: int,
    steps: int,
    seed: int,
    on: Execution,
    journal: Journal,
) -> _Run:
    """All gates open, or as a run before has left them."""
    before = journal.latest(_STEPS)
    facts: dict[str, Any] = {"expected": {}, "history": []}
    if before is None:
        frame_DC = frame_of([shape.hidden_size for shape in budget.shapes])
        on.ranks.copy_(frame_DC)
        log_alpha = _all_at(budget, dense.config, frame_DC, on)
    else:
        facts = before.facts
        if facts["expected"]:
            budget = replace(budget, shapes=[Shape(**facts["shape"])])
        kept = {name: t.to(on.device, copy=True) for name, t in before.tensors.items()}
        frame_DC = kept["frame"]
        log_alpha = Gates(**{n: kept[n] for n in vars(Gates()) if n in kept})
    log_alpha = log_alpha.map(torch.Tensor.requires_grad_)
    optimizer = _optimizer(log_alpha, steps)
    for name, alpha in log_alpha.named().items() if before else ():
        moments = {moment: kept[f"{name}.{moment}"] for moment in _MOMENTS}
        optimizer.state[alpha] = {"step": torch.tensor(float(facts["updates"])), **moments}
    gated = GatedModel(load_frozen(folder, on.dtype, on.device), family, dense.config, frame_DC)
    return _Run(
        gated, frame_DC, budget, log_alpha, optimizer, facts["expected"], facts["history"], tokens,
        batch, steps, seed, on, before.step if before else 0,
    )  # fmt: skip


def _all_at(
    budget: Budget,
    config: Mapping[str, Any],
    frame_DC: Tensor,
    on: Execution,
    start: float = _START,
) -> Gates:
    """The same log-alpha for everything that the budget lets go."""
    dense, layers = budget.dense, config["num_hidden_layers"]
    sizes = {
        "stream_C": budget.varies("hidden_size") and (frame_DC.shape[1],),
        "neurons_LF": budget.varies("intermediate_size") and (layers, dense.intermediate_size),
        "groups_LG": budget.learns_groups() and (layers, dense.num_key_value_heads),
    }
    filled = {n: torch.full(size, start, device=on.device) for n, size in sizes.items() if size}
    return Gates(**filled)


def _optimizer(log_alpha: Gates, steps: int) -> torch.optim.Adam:
    return torch.optim.Adam(log_alpha.named().values(), lr=_WAY / steps, betas=(0.9, 0.95))


def _at_one_shape(run: _Run, frame_of: Callable[[list[int]], Tensor]) -> _Run:
    """Fix the shape nearest to what is open, and start its stream from what its width keeps best.

    Gates of what the shape keeps whole go; of the others those of neurons and groups stay.
    """
    opened = run.log_alpha.map(lambda a: mask.open_probability(a.detach().double().cpu()))
    _, sizes = run.budget.violated(opened, 1.0)
    expected = {name: round(size.item(), 2) for name, size in sizes.items()}
    budget = replace(run.budget, shapes=[nearest(run.budget.shapes, expected)])
    frame_DC, kept = run.frame_DC, run.log_alpha.map(torch.Tensor.detach).named()
    if budget.varies("hidden_size"):
        width = budget.shapes[0].hidden_size
        frame_DC = frame_of([width])
        run.on.ranks.copy_(frame_DC)
        first_C = torch.arange(frame_DC.shape[1], device=run.on.device) < width
        kept["stream_C"] = torch.where(first_C, _BOUND, -_BOUND)
    else:
        kept.pop("stream_C", None)
    if not budget.varies("intermediate_size"):
        kept.pop("neurons_LF", None)
    if not budget.learns_groups():
        kept.pop("groups_LG", None)
    log_alpha = Gates(**kept).map(torch.Tensor.requires_grad_)
    run.gated.turn(frame_DC)
    optimizer = _optimizer(log_alpha, run.steps)
    return replace(
        run, frame_DC=frame_DC, budget=budget, log_alpha=log_alpha, optimizer=optimizer,
        expected=expected,
    )  # fmt: skip


def _step(run: _Run, step: int) -> dict[str, float]:
    """One step of all gates; what it found."""
    on, log_alpha = run.on, run.log_alpha
    order = training.window_order(len(run.tokens), run.seed, step * run.batch, run.batch)
    uniform = _noise(log_alpha, run.batch, run.seed, step)
    mine = torch.arange(run.batch).chunk(on.ranks.count)
    mine = mine[on.ranks.index] if on.ranks.index < len(mine) else torch.arange(0)
    at_once = max(1, int(_TOKENS_OF_A_BATCH * on.batch_tokens) // run.tokens.shape[1])
    total = torch.zeros((), device=on.device)
    for rows in mine.split(at_once) if len(mine) else ():
        tokens = run.tokens[order[rows]].to(on.device)
        with torch.no_grad():
            teacher = run.gated.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        gates = Gates(
            **{
                name: mask.sampled(alpha, uniform[name][rows].to(on.device))
                for name, alpha in log_alpha.named().items()
            }
        )
        with run.gated.through(gates) as model:
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = divergence(logits, teacher, 1.0) * len(rows) / run.batch
            loss.backward()
        total += loss.detach()
    alphas = list(log_alpha.named().values())
    for alpha in alphas:
        alpha.grad = torch.zeros_like(alpha) if alpha.grad is None else alpha.grad
    on.ranks.add_(total, *(alpha.grad for alpha in alphas))

    turn = int(_FALL * run.steps)
    fallen = min(1.0, (step + 1) / max(1, turn))
    if step >= turn:  # gates come to rest
        run.optimizer.param_groups[0]["lr"] = (
            _WAY / run.steps * (run.steps - step) / (run.steps - turn)
        )
    _, jacobian_EN, _ = _constraints(run, fallen)
    gradient_N = torch.cat([alpha.grad.flatten() for alpha in alphas]).to(jacobian_EN)
    prices_E = mask.multipliers(jacobian_EN, gradient_N)
    for alpha, forbidden in _each(alphas, jacobian_EN.T @ prices_E):
        alpha.grad += forbidden
    run.optimizer.step()
    run.optimizer.zero_grad()
    expected = _meet(run, fallen)
    return {
        "step": step + 1,
        "target": run.budget.target(fallen),
        "expected": expected,
        "divergence": total.item(),
    }


def _constraints(run: _Run, fallen: float) -> tuple[Tensor, Tensor, float]:
    """What is violated, `(E,)`, its gradients by all log-alphas in a row, `(E, N)`, float64, and
    the share of the budget's count that is expected to stay open.
    """
    alphas = run.log_alpha.map(lambda alpha: alpha.detach().cpu().double().requires_grad_())
    violated_E, sizes = run.budget.violated(alphas.map(mask.open_probability), fallen)
    leaves = list(alphas.named().values())
    rows = [
        torch.autograd.grad(one, leaves, retain_graph=True, materialize_grads=True)
        for one in violated_E
    ]
    jacobian_EN = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return violated_E.detach(), jacobian_EN, run.budget.cost(sizes).item()


def _meet(run: _Run, fallen: float) -> float:
    """Move the log-alphas until all constraints are met; the share that is then expected to stay
    open.
    """
    alphas = list(run.log_alpha.named().values())
    for _ in range(_CORRECTIONS):
        violated_E, jacobian_EN, expected = _constraints(run, fallen)
        if violated_E.abs().max() < _MET:
            break
        # Far from where it holds a first-order step is too long.
        change_N = mask.correction(jacobian_EN, violated_E).clamp(-1, 1)
        for alpha, change in _each(alphas, change_N):
            alpha.data.add_(change).clamp_(-_BOUND, _BOUND)
    return expected


def _each(alphas: list[Tensor], all_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every log-alpha with its part of a row of all."""
    parts = all_N.split([alpha.numel() for alpha in alphas])
    return [
        (alpha, part.view_as(alpha).to(alpha)) for alpha, part in zip(alphas, parts, strict=True)
    ]


def _noise(log_alpha: Gates, batch: int, seed: int, step: int) -> dict[str, Tensor]:
    """Uniform noise for every gate of every window of a step: the same however windows are dealt
    out, and inside (0, 1), where its logarithms are numbers.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    return {
        name: torch.rand((batch, *alpha.shape), generator=generator).clamp(1e-6, 1 - 1e-6)
        for name, alpha in log_alpha.named().items()
    }


def _detached(gates: Gates) -> Gates:
    return gates.map(lambda value: value.detach().cpu())


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _save(run: _Run, step: int, journal: Journal) -> None:
    """Everything that the steps to come depend on."""
    tensors, updates = {"frame": run.frame_DC}, 0.0
    for name, alpha in run.log_alpha.named().items():
        state = run.optimizer.state[alpha]
        tensors |= {name: alpha.detach(), **{f"{name}.{m}": state[m] for m in _MOMENTS}}
        updates = state["step"].item()
    facts = {"expected": run.expected, "history": run.history, "updates": updates}
    facts["shape"] = vars(run.budget.shapes[0])
    journal.save(_STEPS, step, tensors, facts)
