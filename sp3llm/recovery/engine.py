"""The engine of recovery: accelerate's processes, the order of windows, durable checkpoints.

Everything that a step depends on is in a checkpoint (weights, optimizer, schedule, random states,
what has been decided so far) or follows from the number of the step (its windows), so that a
killed run continues where it was and ends with the same bytes.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import LoggerType, is_tensorboard_available, is_wandb_available
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.maths.shuffling import window_order
from sp3llm.options import RecoverConfig

_IDENTITY, _STATE, _BEST, _TRAINED = (
    "recover.json",
    "state.json",
    "best.safetensors",
    "trained.safetensors",
)


@dataclass
class State:
    """How far a run is, and what it has decided."""

    step: int = 0
    """Steps taken."""
    best_step: int = 0
    """The step with the lowest held-out loss."""
    best_loss: float | None = None
    """That loss."""
    worse: int = 0
    """Checks since then."""
    stopped: bool = False
    """Training ended for want of a better loss."""
    seconds: float = 0.0
    """Spent in training, earlier processes included."""
    held_out: list[list[float]] = field(default_factory=list)
    """Step and held-out loss of every check."""
    trained: list[list[float]] = field(default_factory=list)
    """Step and training loss of every check: a mean over the steps since the one before."""


def engine(settings: RecoverConfig, logs: Path) -> Accelerator:
    """The processes that train: one, or those of `accelerate launch`.

    Raises UserError if there is no such device or tracker.
    """
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.device == "cuda" and on_cpu:
        raise UserError(
            "Expected a GPU that torch can use for --device cuda, found none: use --device cpu or "
            "auto."
        )
    precision = settings.precision
    if precision == "auto":
        precision = "float32" if on_cpu else "bfloat16"
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if settings.track is not None and not available[settings.track]():
        raise UserError(
            f"--track {settings.track} needs the package {settings.track}, which is not installed: "
            f"pip install {settings.track}, or leave it out."
        )
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bfloat16" else "no",
            log_with=None if settings.track is None else LoggerType(settings.track),
            project_dir=str(logs),
        )
    except ValueError as error:
        raise UserError(
            f"accelerate cannot run with --precision {precision} here ({reason(error)}): use "
            "--precision float32, or another process."
        ) from error


def share_of_step(
    settings: RecoverConfig, windows: int, step: int, process: int, processes: int
) -> Tensor:
    """Numbers of the windows that one of several processes takes in a step."""
    order = window_order(windows, settings.seed, step * settings.batch, settings.batch)
    return order.chunk(processes)[process]


# --------------------------------------------------------------------------- on disk


def work_folder(out: Path) -> Path:
    """Where the checkpoints of a run wait until its output stands."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".recover")


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the folder of checkpoints, which is made where there is none, and goes where no
    checkpoint came to be.

    Raises UserError if another run holds it or it cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"Cannot write checkpoints to '{work}' ({error.strerror}): choose another --out."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another sp3llm run holds '{work}': wait for it, or choose another --out."
            ) from error
        try:
            yield
        finally:
            if not _whole(work):
                shutil.rmtree(work, ignore_errors=True)


def _whole(work: Path) -> list[Path]:
    """Checkpoints that were written to their end, the newest last."""
    return sorted(path for path in work.glob("step-*") if path.suffix != ".partial")


def claim(work: Path, identity: Mapping[str, Any]) -> None:
    """Say whose checkpoints the folder holds.

    Raises UserError if they are those of a run that would do something else.
    """
    path = work / _IDENTITY
    if path.is_file() and _whole(work):
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(identity))
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            key = different[0]
            raise UserError(
                f"The checkpoints in '{work}' are of another run ({key} {found.get(key)} there, "
                f"{wanted[key]} here): repeat its command to continue it, remove that folder, or "
                "choose another --out."
            )
        return
    with _room_in(work):
        _write_durably(path, json.dumps(identity, indent=2) + "\n")


def carry_only_trained(accelerator: Accelerator, names: frozenset[str]) -> None:
    """Let checkpoints hold the trained weights only, where those are not all.

    FSDP shards weights in its own format, whole.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            trained = _trained(accelerator.unwrap_model(models[0]).state_dict(), names)
            save_file(trained, Path(folder) / _TRAINED)

    def load(models: list[nn.Module], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        model.load_state_dict(load_file(Path(folder) / _TRAINED), strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, work: Path, state: State) -> None:
    """Write a checkpoint aside, make it durable, give it its name; earlier ones go.

    Raises UserError if there is no room for it.
    """
    final = work / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")
    with _room_in(work):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        (partial / _STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(work)
    for earlier in work.glob("step-*"):
        if earlier != final:
            shutil.rmtree(earlier, ignore_errors=True)


@contextlib.contextmanager
def _room_in(work: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own is a RuntimeError
        raise UserError(
            f"Cannot write a checkpoint to '{work}' ({reason(error)}): free some disk space; the "
            "same command continues from the checkpoint before."
        ) from error


def load_checkpoint(accelerator: Accelerator, work: Path) -> State:
    """Continue from the newest whole checkpoint, or from the beginning."""
    whole = _whole(work)
    if not whole:
        return State()
    accelerator.load_state(str(whole[-1]))
    return State(**json.loads((whole[-1] / _STATE).read_text(encoding="utf-8")))


def save_best(
    accelerator: Accelerator, model: nn.Module, names: frozenset[str], work: Path
) -> None:
    """Keep the trained weights as they are now, whole.

    Raises UserError if there is no room for them.
    """
    tensors = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    with _room_in(work):
        partial = work / f"{_BEST}.partial"
        save_file(_trained(tensors, names), partial)
        _flush(partial)
        os.replace(partial, work / _BEST)
        _flush(work)


def load_best(work: Path) -> dict[str, Tensor]:
    """What `save_best` kept, on the CPU."""
    return load_file(work / _BEST)


def _trained(tensors: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().cpu().contiguous() for name in sorted(names)}


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
