"""The steps of a learned mask: draw gates, descend the divergence, keep to the budget."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp3llm.compression.gated_model import GatedModel
from sp3llm.compression.mask_budget import Budget
from sp3llm.maths.gates import Gates, correction, multipliers, open_probability, sampled
from sp3llm.maths.losses import stream_error
from sp3llm.maths.shuffling import window_order
from sp3llm.models.objectives.schema import Objective
from sp3llm.runtime.devices import Execution
from sp3llm.text.batches import Batch, real_tokens

# The ends of log-alphas, where a gate is as good as closed or open (4 and 996 of 1000 are open
# there, so that what is closed takes no room from what is kept even of a narrow stream), and how
# far they could move in all steps together.
LEAST, MOST, WAY = -7.0, 4.0, 40.0
# The target reaches the budget after this part of the steps; then the shape is fixed.
_FALL = 0.6
# Corrections after a step, each to first order, until no constraint is violated by more than this.
_CORRECTIONS, _MET = 20, 1e-3
# A gradient is kept for as many of a batch's tokens at once as of a streamed batch, by this factor.
_TOKENS_OF_A_BATCH = 1 / 4


@dataclass(frozen=True)
class MaskTraining:
    """What a mask is learned on."""

    tokens: Batch
    """Windows, `(windows, tokens)`, or rows of a task."""
    batch: int
    """Windows or rows a step, over all processes."""
    steps: int
    seed: int
    """Orders the windows and draws the gates."""


@dataclass(frozen=True)
class MaskRun:
    """Everything that changes, and what it is changed by."""

    gated: GatedModel
    objective: Objective
    """What the model is for."""
    frame_DC: Tensor
    budget: Budget
    log_alpha: Gates
    optimizer: torch.optim.Adam
    expected: dict[str, float]
    """Sizes that were open when the shape was fixed; nothing before."""
    history: list[dict[str, float]]
    training: MaskTraining
    execution: Execution
    done: int = 0
    """Steps taken by a run before."""


def shape_fixed_at(steps: int) -> int:
    """The step at which the shape is fixed."""
    return max(1, int(_FALL * steps))


def take_step(run: MaskRun, step: int) -> dict[str, float]:
    """Take one step of all gates.

    Returns its number, the target, the share of the budget's count that is expected to stay open,
    and how far it is from the model without gates (`_distance`): of text the divergence, nats a
    token.
    """
    steps, fixed_at = run.training.steps, shape_fixed_at(run.training.steps)
    loss = _descend(run, step)
    fallen = min(1.0, (step + 1) / fixed_at)
    if step >= fixed_at:  # gates come to rest
        rest = (steps - step) / (steps - fixed_at)
        run.optimizer.param_groups[0]["lr"] = WAY / steps * rest
    alphas = list(run.log_alpha.named().values())
    _, jacobian_EN, _ = _constraints(run, fallen)
    gradient_N = torch.cat([alpha.grad.flatten() for alpha in alphas]).to(jacobian_EN)
    prices_E = multipliers(jacobian_EN, gradient_N)
    for alpha, price in _each(alphas, jacobian_EN.T @ prices_E):
        alpha.grad += price
    run.optimizer.step()
    run.optimizer.zero_grad()
    expected = _meet(run, fallen)
    return {
        "step": step + 1,
        "target": run.budget.target(fallen),
        "expected": expected,
        "divergence": loss,
    }


def _descend(run: MaskRun, step: int) -> float:
    """How far the gated model is from the one without gates on what a step draws (`_distance`); its
    gradients by all log-alphas, over all processes, are left in them.
    """
    execution, log_alpha, training = run.execution, run.log_alpha, run.training
    objective = run.objective
    order = window_order(len(training.tokens), training.seed, step * training.batch, training.batch)
    drawn = training.tokens[order]
    uniform = _noise(log_alpha, training.batch, training.seed, step)
    shares = torch.arange(training.batch).chunk(execution.ranks.count)
    rank = execution.ranks.index
    local_windows = shares[rank] if rank < len(shares) else torch.arange(0)
    at_once = max(1, int(_TOKENS_OF_A_BATCH * execution.batch_tokens) // training.tokens.shape[1])
    total = torch.zeros((), device=execution.device)
    for rows in local_windows.split(at_once) if len(local_windows) else ():
        batch = drawn[rows].to(execution.device)
        with torch.no_grad():
            dense = _said(objective, run.gated.model, batch)
        gates = Gates(
            **{
                name: sampled(alpha, uniform[name][rows].to(execution.device))
                for name, alpha in log_alpha.named().items()
            }
        )
        with run.gated.through(gates) as model:
            said = _said(objective, model, batch)
            loss = _distance(objective, said, dense, batch, drawn)
            loss.backward()
        total += loss.detach()
    alphas = list(log_alpha.named().values())
    for alpha in alphas:
        alpha.grad = torch.zeros_like(alpha) if alpha.grad is None else alpha.grad
    execution.ranks.all_reduce_(total, *(alpha.grad for alpha in alphas))
    return total.item()


@dataclass(frozen=True)
class _Said:
    """What a model says of a batch."""

    logits: Tensor
    """Those that losses look at."""
    streams: tuple[Tensor, ...]
    """In front of all layers and behind the last, `(rows, tokens, D)`; of objectives that compare
    them in a recovery."""


def _said(objective: Objective, model: nn.Module, batch: Batch) -> _Said:
    compares = bool(objective.recipe.hidden_weight)
    asked = {"output_hidden_states": True} if compares else {}
    output = model(**objective.inputs(batch), **asked)
    logits = objective.scored(objective.logits(output, batch))
    return _Said(logits, tuple(output.hidden_states) if compares else ())


def _distance(
    objective: Objective, said: _Said, dense: _Said, batch: Batch, drawn: Batch
) -> Tensor:
    """How far what is said of a batch is from what the dense model says, weighed as in a recovery:
    its part of a mean over all that a step has `drawn`, so that batches of one add up.
    """
    recipe = objective.recipe
    far = objective.divergence(said.logits, dense.logits, recipe.temperature)
    loss = recipe.kl_weight * far * (len(batch) / len(drawn))
    if not recipe.hidden_weight:
        return loss
    same_DD = torch.eye(said.streams[0].shape[-1], device=said.logits.device)
    off = stream_error(said.streams, dense.streams, same_DD, objective.real_tokens(batch))
    share = real_tokens(batch) / real_tokens(drawn)
    return loss + recipe.hidden_weight * off * share


def _constraints(run: MaskRun, fallen: float) -> tuple[Tensor, Tensor, float]:
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


def _meet(run: MaskRun, fallen: float) -> float:
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
        is_stuck_N = ((at_N <= LEAST) & (change_N < 0)) | ((at_N >= MOST) & (change_N > 0))
        change_N = correction(jacobian_EN * ~is_stuck_N, violated_E)
        # Far from where it holds a first-order step is too long.
        for alpha, change in _each(alphas, change_N.clamp(-1, 1)):
            alpha.data.add_(change).clamp_(LEAST, MOST)
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
