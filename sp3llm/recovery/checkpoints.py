"""What survives a killed recovery: checkpoints, and the best weights so far.

Everything that a step depends on is in a checkpoint (weights, optimizer, schedule, random states,
what has been decided so far) or follows from the number of the step (its windows), so that a
killed run continues where it was and ends with the same bytes.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sp3llm.errors import UserError
from sp3llm.runtime.files import rename_durably, write_durably
from sp3llm.runtime.folders import full_disk_told
from sp3llm.runtime.locks import locked_folder, remove_folder

# In the folder of checkpoints: whose they are, and the best weights.
_IDENTITY, _BEST = "recover.json", "best.safetensors"
# In a checkpoint: the `State`, and the trained weights where those are not all.
_STATE, _TRAINED = "state.json", "trained.safetensors"


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


# --------------------------------------------------------------------------- their folder


def work_folder(out: Path) -> Path:
    """Where the checkpoints of a run wait until its output stands."""
    out = Path(os.path.realpath(out))
    return out.with_name(f"{out.name}.recover")


@contextlib.contextmanager
def locked(work: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the folder of checkpoints, which is made where there is none, and goes where there is
    no checkpoint in the end. `say` gets a line where it cannot be locked.

    Raises UserError if another run holds it or it cannot be written.
    """
    with locked_folder(
        work,
        unwritable=f"Cannot write checkpoints to '{work}'",
        taken=f"Another sp3llm run holds '{work}'",
        say=say,
    ):
        try:
            yield
        finally:
            if not _whole(work):
                remove_folder(work)


def claim(work: Path, identity: Mapping[str, Any]) -> None:
    """Say whose checkpoints the folder holds: the run's that `identity` describes.

    Raises UserError if they are those of a run that would do something else.
    """
    path = work / _IDENTITY
    if path.is_file() and _whole(work):
        began = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(identity))
        different = [key for key in wanted if began.get(key) != wanted[key]]
        if different:
            key = different[0]
            raise UserError(
                f"The checkpoints in '{work}' are of another run ({key} {began.get(key)} there, "
                f"{wanted[key]} here): repeat its command to continue it, remove that folder, or "
                "choose another --out."
            )
        return
    text = json.dumps(identity, indent=2) + "\n"
    with _full_disk_told(work):
        write_durably(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _whole(work: Path) -> list[Path]:
    """Checkpoints that were written to their end, the newest last."""
    return sorted(path for path in work.glob("step-*") if path.suffix != ".partial")


def _full_disk_told(work: Path) -> contextlib.AbstractContextManager[None]:
    return full_disk_told(
        f"Cannot write a checkpoint to '{work}'",
        "; the same command continues from the checkpoint before.",
        (OSError, RuntimeError, SafetensorError),  # torch's own is a RuntimeError
    )


# --------------------------------------------------------------------------- checkpoints


def carry_only_trained(accelerator: Accelerator, names: frozenset[str]) -> None:
    """Let checkpoints hold the weights with these names only, the trained ones.

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
    with _full_disk_told(work):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        (partial / _STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        rename_durably(partial, final)
    for earlier in work.glob("step-*"):
        if earlier != final:
            shutil.rmtree(earlier, ignore_errors=True)


def load_checkpoint(accelerator: Accelerator, work: Path) -> State:
    """Continue from the newest whole checkpoint, or from the beginning."""
    whole = _whole(work)
    if not whole:
        return State()
    accelerator.load_state(str(whole[-1]))
    return State(**json.loads((whole[-1] / _STATE).read_text(encoding="utf-8")))


# --------------------------------------------------------------------------- the best weights


def save_best(
    accelerator: Accelerator, model: nn.Module, names: frozenset[str], work: Path
) -> None:
    """Keep the trained weights, those with these names, as they are now, whole.

    Raises UserError if there is no room for them.
    """
    tensors = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    with _full_disk_told(work):
        write_durably(work / _BEST, lambda aside: save_file(_trained(tensors, names), aside))


def load_best(work: Path) -> dict[str, Tensor]:
    """What `save_best` kept, on the CPU."""
    return load_file(work / _BEST)


def trained_parameters(work: Path) -> int:
    """Number of parameters that `save_best` kept."""
    return sum(math.prod(tensor.shape) for tensor in load_best(work).values())


def _trained(tensors: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().cpu().contiguous() for name in sorted(names)}
