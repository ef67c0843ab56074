"""Learn what to keep: SP3's masks (arXiv 2308.16475, DESIGN 3.9), by gates on a frozen model.

The story, top-down:

1. turn the stream into a frame of nested subspaces, and put a gate on every coordinate of it, on
   every neuron of the FFN and on every KV group (`gated`);
2. for some hundred steps, draw the gates, ask the dense model, which is the same one without
   gates, and descend the divergence from it; a Lagrangian keeps what is expected to stay open on
   a target, which falls linearly to the budget, and at the same number in every layer;
3. take the shape within the budget that is nearest to what stayed open, and spend the steps that
   are left at exactly its sizes;
4. take the gates that are open most: what is kept.

The multipliers are solved for in every step and not ascended: within a few hundred steps ascent
lags, then overshoots, and a model that has lost its sense has no gradient that leads back
(eval/NOTES.md).

Only gates are learned. What is left of the weights is refitted in closed form afterwards, from
those of the dense model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from sp3llm.compression.gated_model import GatedModel
from sp3llm.compression.mask_budget import Budget
from sp3llm.compression.projection import KeptUnits
from sp3llm.errors import UserError
from sp3llm.maths.gates import (
    Gates,
    correction,
    folded,
    multipliers,
    open_probability,
    sampled,
    settled,
    top_indices,
)
from sp3llm.maths.losses import divergence
from sp3llm.maths.shuffling import window_order
from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import Family, setting
from sp3llm.models.shapes import Shape
from sp3llm.models.stock import load_frozen
from sp3llm.planning.search import nearest
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import Journal
from sp3llm.runtime.memory import trim_memory

# As a journal knows the steps, and what came out.
_STEPS, _LEARNED = "mask", "learned"
# Log-alphas begin where 98 gates of 100 are open. Their ends are where a gate is as good as open or
# closed (996 and 4 of 1000 are open there, so that what is closed takes no room from what is kept
# even of a narrow stream), and in all steps together they could move by _WAY.
_START, _LEAST, _MOST, _WAY = 2.5, -7.0, 4.0, 40.0
# The target reaches the budget after this part of the steps; then the shape is fixed.
_FALL = 0.6
# Corrections after a step, each to first order, until no constraint is violated by more than this.
_CORRECTIONS, _MET = 20, 1e-3
# A gradient is kept for as many of a batch's tokens at once as of a streamed batch, by this factor.
_TOKENS_OF_A_BATCH = 1 / 4


@dataclass(frozen=True)
class Lessons:
    """What a mask is learned on."""

    tokens: Tensor
    """`(windows, tokens)`."""
    batch: int
    """Windows a step, over all processes."""
    steps: int
    seed: int
    """Orders the windows and draws the gates."""


@dataclass(frozen=True)
class Learned:
    """A learned mask."""

    frame_DC: Tensor
    """The coordinates that stream gates are about."""
    log_alpha: Gates
    shape: Shape
    """The plan that the kept units make."""
    expected: dict[str, float]
    """Sizes that were expected to stay open in the end, by field of a shape."""
    history: list[dict[str, float]]
    """Step, target, expected share of the budget's count, divergence; some of them."""

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        gates = self.log_alpha.map(settled).named()
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
        kept_K = top_indices(score_C, keep).to(self.frame_DC.device)
        gates_K = folded(settled(score_C)).to(self.frame_DC)[kept_K]
        return self.frame_DC[:, kept_K], gates_K

    def kept_units(self) -> KeptUnits:
        """Winning neurons and groups of every layer, with their gates."""

        def of(score_LU: Tensor | None, keep: int) -> Tensor | None:
            if score_LU is None:
                return None
            gates_LU = torch.zeros_like(score_LU, dtype=torch.float64)
            for score_U, gates_U in zip(score_LU, gates_LU, strict=True):
                kept_U = top_indices(score_U, keep)
                gates_U[kept_U] = folded(settled(score_U[kept_U].double()))
            return gates_LU.to(self.frame_DC.device)

        return KeptUnits(
            of(self.log_alpha.neurons_LF, self.shape.intermediate_size),
            of(self.log_alpha.groups_LG, self.shape.num_key_value_heads),
        )


def learn(
    dense: Checkpoint,
    family: Family,
    budget: Budget,
    frame_of: Callable[[list[int]], Tensor],
    lessons: Lessons,
    execution: Execution,
    progress: Progress | None,
    journal: Journal,
) -> Learned:
    """Learn a mask. `frame_of` widths are all coordinates of the stream, `(D, C)`, those first that
    the narrower of the widths need too.

    What `journal` has of it is not done again. Raises UserError if the divergence is no number.
    """
    before = journal.latest(_LEARNED)
    if before is not None:
        facts, tensors = dict(before.facts), dict(before.tensors)
        frame_DC = tensors.pop("frame").to(execution.device)
        return Learned(frame_DC, Gates(**tensors), Shape(**facts.pop("shape")), **facts)
    run, steps = _begin(dense, family, budget, frame_of, lessons, execution, journal), lessons.steps
    bar = None if progress is None else progress.add_task("learned mask", total=steps)
    fixed_at = _shape_fixed_at(steps)
    for step in range(run.done, steps):
        if step == fixed_at:
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
    log_alpha = run.log_alpha.map(lambda alpha: alpha.detach().cpu())
    found = Learned(run.frame_DC, log_alpha, run.budget.shapes[0], run.expected, run.history)
    facts = {"shape": vars(found.shape), "expected": run.expected, "history": run.history}
    journal.save(_LEARNED, 0, {**found.log_alpha.named(), "frame": run.frame_DC}, facts)
    journal.drop(_STEPS)
    del run
    trim_memory()
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
    lessons: Lessons
    execution: Execution
    done: int = 0
    """Steps taken by a run before."""


def _begin(
    dense: Checkpoint,
    family: Family,
    budget: Budget,
    frame_of: Callable[[list[int]], Tensor],
    lessons: Lessons,
    execution: Execution,
    journal: Journal,
) -> _Run:
    """All gates open, or as a run before has left them."""
    before = journal.latest(_STEPS)
    facts: dict[str, Any] = {"expected": {}, "history": []}
    if before is None:
        frame_DC = frame_of([shape.hidden_size for shape in budget.shapes])
        execution.ranks.broadcast_(frame_DC)
        log_alpha = _all_open(budget, setting(family, dense.config, "num_hidden_layers"), frame_DC)
    else:
        facts = before.facts
        if facts["expected"]:
            budget = replace(budget, shapes=[Shape(**facts["shape"])])
        kept = {name: t.to(execution.device, copy=True) for name, t in before.tensors.items()}
        frame_DC = kept["frame"]
        log_alpha = Gates(**{n: kept[n] for n in vars(Gates()) if n in kept})
    log_alpha = log_alpha.map(torch.Tensor.requires_grad_)
    optimizer = _optimizer(log_alpha, lessons.steps)
    for name, alpha in log_alpha.named().items() if before else ():
        moments = {moment: kept[f"{name}.{moment}"] for moment in _MOMENTS}
        optimizer.state[alpha] = {"step": torch.tensor(float(facts["updates"])), **moments}
    model = load_frozen(dense.folder, execution.dtype, execution.device)
    gated = GatedModel(model, family, dense.config, frame_DC)
    return _Run(
        gated, frame_DC, budget, log_alpha, optimizer, facts["expected"], facts["history"], lessons,
        execution, before.step if before else 0,
    )  # fmt: skip


def _all_open(budget: Budget, layers: int, frame_DC: Tensor) -> Gates:
    """Log-alphas of everything that the budget lets go."""
    sizes = {
        "stream_C": (frame_DC.shape[1],),
        "neurons_LF": (layers, budget.dense.intermediate_size),
        "groups_LG": (layers, budget.dense.num_key_value_heads),
    }
    device = frame_DC.device
    return Gates(**{n: torch.full(sizes[n], _START, device=device) for n in budget.gated()})


def _shape_fixed_at(steps: int) -> int:
    """The step at which the shape is fixed."""
    return max(1, int(_FALL * steps))


def _optimizer(log_alpha: Gates, steps: int) -> torch.optim.Adam:
    return torch.optim.Adam(log_alpha.named().values(), lr=_WAY / steps, betas=(0.9, 0.95))


def _at_one_shape(run: _Run, frame_of: Callable[[list[int]], Tensor]) -> _Run:
    """Fix the shape nearest to what is open, and start its stream from what its width keeps best.

    Gates of what the shape keeps whole go; of the others those of neurons and groups stay.
    """
    opened = run.log_alpha.map(lambda a: open_probability(a.detach().double().cpu()))
    _, sizes = run.budget.violated(opened, 1.0)
    expected = {name: round(size.item(), 2) for name, size in sizes.items()}
    budget = replace(run.budget, shapes=[nearest(run.budget.shapes, expected)])
    left = run.log_alpha.map(torch.Tensor.detach).named()
    frame_DC, kept = run.frame_DC, {name: left[name] for name in budget.gated()}
    if "stream_C" in kept:
        width = budget.shapes[0].hidden_size
        frame_DC = frame_of([width])
        run.execution.ranks.broadcast_(frame_DC)
        free = width - (len(frame_DC) - frame_DC.shape[1])  # one less under LayerNorm
        first_C = torch.arange(frame_DC.shape[1], device=run.execution.device) < free
        kept["stream_C"] = torch.where(first_C, _MOST, _LEAST)
    log_alpha = Gates(**kept).map(torch.Tensor.requires_grad_)
    run.gated.set_frame(frame_DC)
    optimizer = _optimizer(log_alpha, run.lessons.steps)
    return replace(
        run, frame_DC=frame_DC, budget=budget, log_alpha=log_alpha, optimizer=optimizer,
        expected=expected,
    )  # fmt: skip


def _step(run: _Run, step: int) -> dict[str, float]:
    """One step of all gates; what it found."""
    execution, log_alpha, lessons = run.execution, run.log_alpha, run.lessons
    order = window_order(len(lessons.tokens), lessons.seed, step * lessons.batch, lessons.batch)
    uniform = _noise(log_alpha, lessons.batch, lessons.seed, step)
    local_windows = torch.arange(lessons.batch).chunk(execution.ranks.count)
    local_windows = (
        local_windows[execution.ranks.index]
        if execution.ranks.index < len(local_windows)
        else torch.arange(0)
    )
    at_once = max(1, int(_TOKENS_OF_A_BATCH * execution.batch_tokens) // lessons.tokens.shape[1])
    total = torch.zeros((), device=execution.device)
    for rows in local_windows.split(at_once) if len(local_windows) else ():
        tokens = lessons.tokens[order[rows]].to(execution.device)
        with torch.no_grad():
            teacher = run.gated.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        gates = Gates(
            **{
                name: sampled(alpha, uniform[name][rows].to(execution.device))
                for name, alpha in log_alpha.named().items()
            }
        )
        with run.gated.through(gates) as model:
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = divergence(logits, teacher, 1.0) * len(rows) / lessons.batch
            loss.backward()
        total += loss.detach()
    alphas = list(log_alpha.named().values())
    for alpha in alphas:
        alpha.grad = torch.zeros_like(alpha) if alpha.grad is None else alpha.grad
    execution.ranks.all_reduce_(total, *(alpha.grad for alpha in alphas))

    fixed_at = _shape_fixed_at(lessons.steps)
    fallen = min(1.0, (step + 1) / fixed_at)
    if step >= fixed_at:  # gates come to rest
        run.optimizer.param_groups[0]["lr"] = (
            _WAY / lessons.steps * (lessons.steps - step) / (lessons.steps - fixed_at)
        )
    _, jacobian_EN, _ = _constraints(run, fallen)
    gradient_N = torch.cat([alpha.grad.flatten() for alpha in alphas]).to(jacobian_EN)
    prices_E = multipliers(jacobian_EN, gradient_N)
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
    violated_E, sizes = run.budget.violated(alphas.map(open_probability), fallen)
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
        change_N = correction(jacobian_EN, violated_E)
        at_N = torch.cat([alpha.detach().flatten() for alpha in alphas]).to(change_N)
        is_stuck_N = ((at_N <= _LEAST) & (change_N < 0)) | ((at_N >= _MOST) & (change_N > 0))
        change_N = correction(jacobian_EN * ~is_stuck_N, violated_E)
        # Far from where it holds a first-order step is too long.
        for alpha, change in _each(alphas, change_N.clamp(-1, 1)):
            alpha.data.add_(change).clamp_(_LEAST, _MOST)
    else:
        *_, expected = _constraints(run, fallen)
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
