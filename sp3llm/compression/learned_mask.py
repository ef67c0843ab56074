"""Learn what to keep: SP3's masks (arXiv 2308.16475), by gates on a frozen model.

docs/design.md 3.9.

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
from sp3llm.compression.mask_steps import (
    LEAST,
    MOST,
    WAY,
    MaskRun,
    MaskTraining,
    shape_fixed_at,
    take_step,
)
from sp3llm.compression.projection import KeptUnits
from sp3llm.errors import UserError
from sp3llm.maths.gates import (
    Gates,
    folded,
    open_probability,
    settled,
    top_indices,
)
from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import Family, setting
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.shapes import Shape
from sp3llm.models.stock import load_frozen
from sp3llm.planning.search import nearest
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import Journal
from sp3llm.runtime.memory import trim_memory

# As a journal knows the steps, and what came out.
_STEPS, _LEARNED = "mask", "learned"
# Log-alphas begin where 98 gates of 100 are open.
_START = 2.5


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
        """The coordinates of the stream that are kept, as columns, `(D, K)` (under LayerNorm
        `(D, K - 1)`), and their gates; None where the stream has no gates.
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
        """The neurons and KV groups that every layer keeps, with their gates."""

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
    training: MaskTraining,
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
    run, steps = (
        _begin(dense, family, budget, frame_of, training, execution, journal),
        training.steps,
    )
    bar = None if progress is None else progress.add_task("learned mask", total=steps)
    fixed_at = shape_fixed_at(steps)
    for step in range(run.done, steps):
        if step == fixed_at:
            run = _at_one_shape(run, frame_of)
        entry = take_step(run, step)
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
    learned = Learned(run.frame_DC, log_alpha, run.budget.shapes[0], run.expected, run.history)
    facts = {"shape": vars(learned.shape), "expected": run.expected, "history": run.history}
    journal.save(_LEARNED, 0, {**learned.log_alpha.named(), "frame": run.frame_DC}, facts)
    journal.drop(_STEPS)
    del run
    trim_memory()
    return learned


def _begin(
    dense: Checkpoint,
    family: Family,
    budget: Budget,
    frame_of: Callable[[list[int]], Tensor],
    training: MaskTraining,
    execution: Execution,
    journal: Journal,
) -> MaskRun:
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
    optimizer = _optimizer(log_alpha, training.steps)
    for name, alpha in log_alpha.named().items() if before else ():
        moments = {moment: kept[f"{name}.{moment}"] for moment in _MOMENTS}
        optimizer.state[alpha] = {"step": torch.tensor(float(facts["updates"])), **moments}
    objective = objective_of(family.architecture)
    model = load_frozen(dense.folder, objective, execution.dtype, execution.device)
    gated = GatedModel(model, family, dense.config, frame_DC)
    return MaskRun(
        gated=gated,
        objective=objective,
        frame_DC=frame_DC,
        budget=budget,
        log_alpha=log_alpha,
        optimizer=optimizer,
        expected=facts["expected"],
        history=facts["history"],
        training=training,
        execution=execution,
        done=before.step if before else 0,
    )


def _all_open(budget: Budget, layers: int, frame_DC: Tensor) -> Gates:
    """Log-alphas of everything that the budget lets go."""
    sizes = {
        "stream_C": (frame_DC.shape[1],),
        "neurons_LF": (layers, budget.dense.intermediate_size),
        "groups_LG": (layers, budget.dense.num_key_value_heads),
    }
    device = frame_DC.device
    return Gates(**{n: torch.full(sizes[n], _START, device=device) for n in budget.gated()})


def _optimizer(log_alpha: Gates, steps: int) -> torch.optim.Adam:
    return torch.optim.Adam(log_alpha.named().values(), lr=WAY / steps, betas=(0.9, 0.95))


def _at_one_shape(run: MaskRun, frame_of: Callable[[list[int]], Tensor]) -> MaskRun:
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
        kept["stream_C"] = torch.where(first_C, MOST, LEAST)
    log_alpha = Gates(**kept).map(torch.Tensor.requires_grad_)
    run.gated.set_frame(frame_DC)
    optimizer = _optimizer(log_alpha, run.training.steps)
    return replace(
        run,
        frame_DC=frame_DC,
        budget=budget,
        log_alpha=log_alpha,
        optimizer=optimizer,
        expected=expected,
    )


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _save(run: MaskRun, step: int, journal: Journal) -> None:
    """Everything that the steps to come depend on."""
    tensors, updates = {"frame": run.frame_DC}, 0.0
    for name, alpha in run.log_alpha.named().items():
        state = run.optimizer.state[alpha]
        tensors |= {name: alpha.detach(), **{f"{name}.{m}": state[m] for m in _MOMENTS}}
        updates = state["step"].item()
    facts = {"expected": run.expected, "history": run.history, "updates": updates}
    facts["shape"] = vars(run.budget.shapes[0])
    journal.save(_STEPS, step, tensors, facts)
