"""The dense model as a teacher: whole, in low bits, offloaded, or its largest logits on disk."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.maths.losses import TopLogits, divergence, top_divergence, top_logits
from sp3llm.quantization.bits import bits_config, check_installed, take_any_width

_INDEX = "teacher.json"


def load_teacher(
    folder: Path, dtype: str, device: torch.device, memory: float | None, offload: Path
) -> nn.Module:
    """The stock dense model, without gradients.

    `dtype` is one of `config.TEACHER_DTYPES`; `auto` is the checkpoint's own on an accelerator and
    float32 on a CPU. With `memory` (GB) no more of it than that stands on `device`; the rest waits
    on the host, and what the host does not hold in the folder `offload`.

    Raises UserError if bitsandbytes is asked for and missing, or the model does not load.
    """
    from transformers import AutoModelForCausalLM

    on_cpu = device.type == "cpu"
    if dtype == "auto":
        dtype = "float32" if on_cpu else "auto"
    place: dict[str, Any] = {"device_map": {"": device}}
    if memory is not None:
        place = {"device_map": "auto", "max_memory": _shares(device, memory)}
        place["offload_folder"] = str(offload)
    if dtype in ("int8", "nf4"):
        check_installed(f"A teacher in {dtype}", "use --teacher-dtype bfloat16")
        arithmetic = torch.float32 if on_cpu else torch.bfloat16
        place["quantization_config"] = bits_config(dtype, arithmetic)
        dtype = "float32" if on_cpu else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **place)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"Cannot load the teacher '{folder}' ({type(error).__name__}: {reason(error)}): check "
            "--teacher, or use another --teacher-dtype or --teacher-memory."
        ) from error
    if on_cpu:
        take_any_width(model)
    return model.requires_grad_(False).eval()


def _shares(device: torch.device, memory: float) -> dict[int | str, int]:
    """Bytes of each place that accelerate may fill, the device first."""
    most = int(memory * 1e9)
    if device.type == "cpu":
        return {"cpu": most}
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return {device.index or 0: most, "cpu": int(0.8 * available)}


class StreamTap:
    """Keeps the residual stream of a stock model as it enters every layer and the final norm."""

    def __init__(self, model: nn.Module, layers: str, final_norm: str) -> None:
        at = [*model.get_submodule(layers), model.get_submodule(final_norm)]
        self._found: dict[int, Tensor] = {}
        for number, module in enumerate(at):
            module.register_forward_pre_hook(self._keeper(number), with_kwargs=True)

    def _keeper(self, number: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # A layer that is computed again for its gradients enters a second time.
            self._found.setdefault(number, args[0] if args else kwargs["hidden_states"])

        return keep

    def take(self) -> list[Tensor]:
        """What the last forward pass left, `(B, S, width)` each; it is forgotten here."""
        found, self._found = self._found, {}
        return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs beside the model it teaches."""

    model: nn.Module
    tap: StreamTap | None
    """Where hidden states are compared too."""
    device: torch.device
    """Where its answers are wanted."""

    @torch.no_grad()
    def answers(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits `(B, S, V)` for token ids `(B, S)`, and the stream if it is tapped."""
        # An offloaded model's hooks bring inputs to where each layer runs.
        logits = self.model(input_ids=tokens, use_cache=False).logits
        streams = [] if self.tap is None else self.tap.take()
        return logits.to(self.device), [stream.to(self.device) for stream in streams]

    def divergence(
        self, logits: Tensor, rows: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Divergence of the logits `(B, S - 1, V)` from its own; and its stream."""
        wanted, streams = self.answers(tokens)
        return divergence(logits, wanted[:, :-1], temperature), streams


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher's largest logits, read from disk by the number of the window."""

    ids: np.ndarray
    log_probs: np.ndarray
    log_rest: np.ndarray
    device: torch.device

    def divergence(
        self, logits: Tensor, rows: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Divergence of the logits `(B, S - 1, V)` of the windows `rows` from the stored ones."""
        numbers = rows.numpy()
        found = TopLogits(
            torch.from_numpy(self.ids[numbers]).to(self.device, torch.int64),
            torch.from_numpy(self.log_probs[numbers]).to(self.device),
            torch.from_numpy(self.log_rest[numbers]).to(self.device),
        )
        return top_divergence(logits, found, temperature), []


Teacher = LiveTeacher | StoredTeacher


def stored_logits(folder: Path, identity: dict[str, Any], device: torch.device) -> Teacher | None:
    """The teacher stored in `folder`, or None if there is nothing.

    Raises UserError if it is another teacher's, of other text or at another temperature.
    """
    if not folder.exists():
        return None
    try:
        found = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected a teacher's logits in '{folder}', found something else "
            f"({reason(error)}): choose another --teacher-logits."
        ) from error
    for key, value in identity.items():
        if found.get(key) != value:
            raise UserError(
                f"The logits in '{folder}' are of another run ({key} {found.get(key)} there, "
                f"{value} here): choose another --teacher-logits, or remove that folder."
            )
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return StoredTeacher(*arrays, device)


_ARRAYS = {"ids": np.int32, "log_probs": np.float32, "log_rest": np.float32}


def create_store(folder: Path, identity: dict[str, Any], windows: int, seq_len: int) -> Path:
    """Empty arrays for the logits of so many windows, in a folder beside `folder`."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shape = (windows, seq_len - 1, identity["top_k"])
    try:
        partial.mkdir(parents=True)
        for name, dtype in _ARRAYS.items():
            sizes = shape[:2] if name == "log_rest" else shape
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, sizes).flush()
        (partial / _INDEX).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Cannot write to '{partial}' ({error.strerror}): choose another --teacher-logits."
        ) from error
    return partial


def fill_store(
    folder: Path,
    teacher: LiveTeacher,
    tokens: Tensor,
    rows: list[Tensor],
    temperature: float,
    advance: Callable[[int], None],
) -> None:
    """Compute and store the logits of the windows numbered in each of `rows`."""
    arrays = {name: np.load(_partial(folder) / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS}
    count = arrays["ids"].shape[-1]
    for numbers in rows:
        logits, _ = teacher.answers(tokens[numbers].to(teacher.device))
        top = top_logits(logits[:, :-1], count, temperature)
        arrays["ids"][numbers] = top.ids_BSJ.cpu().numpy()
        arrays["log_probs"][numbers] = top.log_probs_BSJ.cpu().numpy()
        arrays["log_rest"][numbers] = top.log_rest_BS.cpu().numpy()
        advance(len(numbers))
    for array in arrays.values():
        array.flush()


def close_store(folder: Path) -> None:
    """Give the filled store its name."""
    os.replace(_partial(folder), folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")
