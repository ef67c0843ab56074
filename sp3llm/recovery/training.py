"""The steps of a recovery, the held-out loss, and when to stop."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig
from sp3llm.recovery.setup import TrainingSetup
from sp3llm.recovery.student import peak_lr, set_peak_lr

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.recovery.checkpoints import State


def train(setup: TrainingSetup, progress: "Progress") -> "State":
    """Take the steps that are left; the best weights are on disk when it returns.

    Raises UserError if the loss is no number any more.
    """
    from sp3llm.recovery.checkpoints import load_checkpoint, save_checkpoint
    from sp3llm.runtime.progress import print_line

    settings, accelerator = setup.run.settings, setup.run.accelerator
    work = setup.run.work
    state = load_checkpoint(accelerator, work)
    if state.step:
        print_line(progress.console, f"Continuing from step {state.step}.")
    else:
        _check(setup, state, [])
        step_tokens = settings.batch * setup.run.texts.training.tokens.shape[1]
        lr = peak_lr(settings, setup.run.pair, state.held_out[0][1], step_tokens)
        set_peak_lr(setup.schedule, lr)
    bar = progress.add_task("recovery", total=settings.steps, completed=state.step)
    recent: list[Tensor] = []
    with _kept_time(state) as lap:
        while state.step < settings.steps and not state.stopped:
            recent.append(_step(setup, state.step))
            state.step += 1
            at_end = state.step == settings.steps
            if state.step % settings.checked_every == 0 or at_end:
                _check(setup, state, recent)
                recent = []
                what = f"recovery, held-out loss {state.held_out[-1][1]:.4f}"
                progress.update(bar, description=what)
            if state.step % settings.saved_every == 0 or at_end or state.stopped:
                lap()
                # A mean of the training loss that a kill cuts in two is not worth a file.
                save_checkpoint(accelerator, work, state)
            progress.update(bar, completed=state.step)
    return state


@contextmanager
def _kept_time(state: "State") -> Iterator[Any]:
    """Adds the time spent to the state whenever what it yields is called."""
    last = time.monotonic()

    def lap() -> None:
        nonlocal last
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now

    yield lap


def share_of_step(
    settings: RecoverConfig, windows: int, step: int, process: int, processes: int
) -> "Tensor":
    """Which of so many training windows one of several processes takes in a step, by number."""
    from sp3llm.maths.shuffling import window_order

    order = window_order(windows, settings.seed, step * settings.batch, settings.batch)
    return order.chunk(processes)[process]


def _step(setup: TrainingSetup, step: int) -> "Tensor":
    """One optimizer step over this process's share; returns the share's loss."""
    import torch

    settings, accelerator = setup.run.settings, setup.run.accelerator
    share = share_of_step(
        settings, setup.training, step, accelerator.process_index, accelerator.num_processes
    )
    micro_batches = share.split(setup.run.micro_batch)
    total = torch.zeros((), device=accelerator.device)
    for number, rows in enumerate(micro_batches, 1):
        is_last = number == len(micro_batches)
        with nullcontext() if is_last else accelerator.no_sync(setup.model):
            loss = _loss(setup, rows) / len(micro_batches)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(setup.model.parameters(), settings.clip)
    setup.optimizer.step()
    setup.schedule.step()
    setup.optimizer.zero_grad()
    return total


def _loss(setup: TrainingSetup, rows: "Tensor") -> "Tensor":
    """The loss on what of `TrainingSetup.tokens` is numbered in `rows`, a mean over it."""
    from sp3llm.maths.losses import stream_error

    settings = setup.run.settings
    batch = setup.tokens[rows].to(setup.run.accelerator.device)
    objective = setup.run.pair.objective
    logits = objective.scored(objective.logits(setup.model(**objective.inputs(batch)), batch))
    divergence, dense = setup.teacher.divergence(logits, rows, batch, settings.temperature)
    loss = settings.kl_weight * divergence
    if settings.lm_weight:
        loss = loss + settings.lm_weight * objective.learning_loss(logits, batch)
    if setup.tap is not None:
        wanted = [dense[place] for place in setup.places]
        real = objective.real_tokens(batch)
        error = stream_error(setup.tap.take(), wanted, setup.target_DK, real)
        loss = loss + settings.hidden_weight * error
    return loss


def _held_out_loss(setup: TrainingSetup, rows: "Tensor") -> float:
    """Mean loss on the windows numbered in `rows`, over all processes.

    All processes call the model equally often, as its wrappers want, which synchronise buffers or
    weights in every call: one without windows that are left runs the first again, for nothing.
    """
    import torch

    accelerator, at_once = setup.run.accelerator, setup.run.micro_batch
    own = rows[accelerator.process_index :: accelerator.num_processes]
    most = -(-len(rows) // accelerator.num_processes)
    total = torch.zeros((), device=accelerator.device)
    with torch.no_grad():
        for start in range(0, most, at_once):
            some = own[start : start + at_once]
            loss = _loss(setup, some if len(some) else rows[:1])
            total += len(some) * loss
    return accelerator.reduce(total, "sum").item() / len(rows)


def _check(setup: TrainingSetup, state: "State", recent: "list[Tensor]") -> None:
    """Take the held-out loss, keep the weights if they are the best so far, decide to stop.

    `recent` are this process's training losses of the steps since the last check. A start that was
    fitted to the very text is noted and no more: tuned weights are not to be measured by it.
    """
    import torch

    from sp3llm.recovery.checkpoints import save_best

    settings, accelerator = setup.run.settings, setup.run.accelerator
    rows = torch.arange(setup.training, len(setup.tokens))
    loss = _held_out_loss(setup, rows)
    values = {"held_out_loss": loss}
    if recent:
        mean = accelerator.reduce(torch.stack(recent).mean(), "mean").item()
        state.trained.append([state.step, mean])
        values |= {"loss": mean, "lr": setup.optimizer.param_groups[0]["lr"]}
    if not math.isfinite(loss):
        raise UserError(
            f"Expected a finite loss at step {state.step}, found {loss}: use a smaller --lr, or "
            "--precision float32."
        )
    state.held_out.append([state.step, loss])
    if settings.track:
        accelerator.log(values, step=state.step)
    if state.step == 0 and setup.run.texts.stopping_is_fitted:
        return
    if state.best_loss is None or loss < state.best_loss:
        state.best_step, state.best_loss, state.worse = state.step, loss, 0
        save_best(accelerator, setup.model, setup.names, setup.run.work)
    else:
        state.worse += 1
        state.stopped = state.worse >= settings.patience
