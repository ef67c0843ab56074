"""The dense model as a teacher beside the model it teaches: whole, in few bits, or offloaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.maths.spelling import Spelling, spelled_logits
from sp3llm.models.families import Family
from sp3llm.models.objectives.schema import Objective
from sp3llm.quantization.bits import bits_config, check_installed, take_any_width
from sp3llm.recovery.inputs import Run
from sp3llm.runtime.devices import compute_dtype
from sp3llm.runtime.memory import host_memory
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.vocabulary.spelling import spelling_of

# Of the host's free memory, the share that an offloaded teacher may fill: the rest is for the model
# that is trained and for what loading takes.
_SHARE_OF_HOST = 0.8
# The first releases that run a model on a CPU of which a part waits on disk.
_OFFLOAD_ON_CPU = {"accelerate": (1, 15), "transformers": (5, 14)}


def load_teacher(
    folder: Path,
    objective: Objective,
    dtype: str,
    device: torch.device,
    memory: float | None,
    offload: Path,
) -> nn.Module:
    """The stock dense model, without gradients.

    `dtype` is one of `options.choices.TEACHER_DTYPES`; `auto` is the checkpoint's own. With
    `memory` (GB) no more of it than that stands on `device`; the rest waits on the host, and what
    the host does not hold in the folder `offload`.

    Raises UserError if bitsandbytes is asked for and missing, or the model does not load.
    """
    on_cpu = device.type == "cpu"
    place: dict[str, Any] = {"device_map": {"": device}}
    if memory is not None:
        if on_cpu:
            _check_offloads_on_cpu()
        place = {"device_map": "auto", "max_memory": _shares(device, memory)}
        place["offload_folder"] = str(offload)
    if dtype in ("int8", "nf4"):
        check_installed(f"A teacher in {dtype}", "use --teacher-dtype bfloat16")
        arithmetic = torch.float32 if on_cpu else torch.bfloat16
        place["quantization_config"] = bits_config(dtype, arithmetic)
        dtype = "float32" if on_cpu else "auto"
    try:
        model = objective.stock_class().from_pretrained(folder, dtype=dtype, **place)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"Cannot load the teacher '{folder}' ({type(error).__name__}: {reason(error)}): check "
            "--teacher, or use another --teacher-dtype or --teacher-memory."
        ) from error
    if on_cpu:
        take_any_width(model)
    return model.requires_grad_(False).eval()


def offloads_on_cpu() -> bool:
    """Whether these libraries run a model of which a CPU's memory holds a part: older ones leave
    its positions, or all of it, on disk.
    """
    import accelerate
    import transformers

    found = {"accelerate": accelerate.__version__, "transformers": transformers.__version__}
    return all(
        tuple(map(int, found[name].split(".")[:2])) >= least
        for name, least in _OFFLOAD_ON_CPU.items()
    )


def _check_offloads_on_cpu() -> None:
    if not offloads_on_cpu():
        least = " and ".join(
            f"{n} {major}.{minor}" for n, (major, minor) in _OFFLOAD_ON_CPU.items()
        )
        raise UserError(
            f"--teacher-memory on a CPU needs {least}, found older ones: install these, or leave "
            "--teacher-memory out."
        )


def _shares(device: torch.device, memory: float) -> dict[int | str, int]:
    """Bytes of each place that accelerate may fill, the device first."""
    most = int(memory * 1e9)
    if device.type == "cpu":
        return {"cpu": most}
    return {device.index or 0: most, "cpu": int(_SHARE_OF_HOST * host_memory({}))}


class StreamTap:
    """Keeps the residual stream of a stock model as it enters every layer and the final norm."""

    def __init__(self, model: nn.Module, layers: str, final_norm: str) -> None:
        at = [*model.get_submodule(layers), model.get_submodule(final_norm)]
        self._streams: dict[int, Tensor] = {}
        for number, module in enumerate(at):
            module.register_forward_pre_hook(self._keeper(number), with_kwargs=True)

    def _keeper(self, number: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # A layer that is computed again for its gradients enters a second time, after `take`:
            # what that leaves gives way to the next forward pass.
            self._streams[number] = args[0] if args else kwargs["hidden_states"]

        return keep

    def take(self) -> list[Tensor]:
        """What the last forward pass left, `(B, S, width)` each; it is forgotten here."""
        streams, self._streams = self._streams, {}
        return [streams[number] for number in sorted(streams)]


class StatesTap:
    """Keeps the hidden states that a stock encoder returns: its residual stream in front of every
    layer, and behind the last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._streams: Sequence[Tensor] = ()
        # Not on the model itself: with adapters most releases of peft call it past all hooks.
        encoder = model.base_model
        encoder.register_forward_pre_hook(self._ask, with_kwargs=True)
        encoder.register_forward_hook(self._keep)

    def _ask(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, {**kwargs, "output_hidden_states": True}

    def _keep(self, _: nn.Module, __: tuple, output: Any) -> None:
        self._streams = output.hidden_states

    def take(self) -> list[Tensor]:
        """What the last forward pass left, `(B, S, width)` each; it is forgotten here."""
        streams, self._streams = self._streams, ()
        return list(streams)


def tap_of(model: nn.Module, objective: Objective, family: Family) -> StreamTap | StatesTap:
    """What keeps the residual stream of a stock model."""
    if objective.states_are_stream:
        return StatesTap(model)
    return StreamTap(model, family.layers_module, family.final_norm)


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs beside the model it teaches."""

    model: nn.Module
    objective: Objective
    """What it is for."""
    tap: StreamTap | StatesTap | None
    """Where hidden states are compared too."""
    device: torch.device
    """Where its answers are wanted."""
    rows: Tensor | None = None
    """By token of the model it teaches its own, where that has some of them only; None: all."""
    spelling: Spelling | None = None
    """How that spells the others; None: what is given to them is not compared."""

    @torch.no_grad()
    def answers(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Logits for a batch, of tokens `(B, S, V)`, and the stream if it is tapped; of a model
        with some of its tokens both are that one's.
        """
        objective, tokens = self.objective, batch
        if self.rows is not None:
            batch = objective.in_rows(batch, self.rows)
        # An offloaded model's hooks bring inputs to where each layer runs.
        logits = objective.logits(self.model(**objective.inputs(batch)), batch)
        if self.spelling is not None:
            windows = zip(logits, tokens, strict=True)
            logits = torch.stack([spelled_logits(*window, self.spelling) for window in windows])
        elif self.rows is not None:
            logits = objective.of_rows(logits, self.rows)
        streams = [] if self.tap is None else self.tap.take()
        return logits.to(self.device), [stream.to(self.device) for stream in streams]

    def divergence(
        self, logits: Tensor, rows: Tensor, batch: Any, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Divergence of scored logits, of tokens `(B, S - 1, V)`, from its own; and its stream."""
        wanted, streams = self.answers(batch)
        wanted = self.objective.scored(wanted)
        return self.objective.divergence(logits, wanted, temperature), streams


def live_teacher(run: Run) -> LiveTeacher:
    """The run's teacher, loaded, with its residual stream tapped where that is compared."""
    settings, device = run.settings, run.accelerator.device
    dtype = settings.teacher_dtype
    if dtype == "auto":
        found = compute_dtype("auto", run.pair.dense.dtype(), device)
        dtype = str(found).removeprefix("torch.")
    model = load_teacher(
        run.pair.dense.folder,
        run.pair.objective,
        dtype,
        device,
        settings.teacher_memory,
        offload=run.work / "teacher",
    )
    tap = None
    if settings.hidden_weight:
        tap = tap_of(model, run.pair.objective, run.pair.dense_family)
    rows, spelling = None, None
    if run.pair.rows is not None:
        rows = torch.tensor(run.pair.rows)
    if run.pair.spells:
        folders = run.pair.dense.folder, run.pair.small.folder
        spelling = spelling_of(*map(load_tokenizer, folders), run.pair.rows)
    return LiveTeacher(model, run.pair.objective, tap, device, rows, spelling)
