"""A teacher's largest logits: computed once, kept on disk, and taught with from then on.

A store is a folder of three arrays over all windows and positions, and an index that says whose
they are. It is filled under another name, which becomes its own when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sp3llm.errors import UserError, reason
from sp3llm.maths.losses import TopLogits, top_divergence, top_logits
from sp3llm.recovery.teacher import LiveTeacher
from sp3llm.runtime.files import rename_durably, write_json

_INDEX = "teacher.json"
# The arrays of a store and their dtypes: token ids and log-probabilities of the largest logits, and
# the logarithm of the probability of all other tokens (`maths.losses.TopLogits`).
_ARRAYS = {"ids": np.int32, "log_probs": np.float32, "log_rest": np.float32}


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher's largest logits, read from disk by the number of the window."""

    ids: np.ndarray
    """`(windows, seq_len - 1, top_k)`, mapped from disk, like the others."""
    log_probs: np.ndarray
    """`(windows, seq_len - 1, top_k)`, at the temperature of the run."""
    log_rest: np.ndarray
    """`(windows, seq_len - 1)`."""
    device: torch.device
    """Where its answers are wanted."""

    def divergence(
        self, logits: Tensor, rows: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Divergence of the logits `(B, S - 1, V)` of the windows `rows` from the stored ones."""
        numbers = rows.numpy()
        largest = TopLogits(
            torch.from_numpy(self.ids[numbers]).to(self.device, torch.int64),
            torch.from_numpy(self.log_probs[numbers]).to(self.device),
            torch.from_numpy(self.log_rest[numbers]).to(self.device),
        )
        return top_divergence(logits, largest, temperature), []


def stored_logits(
    folder: Path, identity: dict[str, Any], device: torch.device
) -> StoredTeacher | None:
    """The teacher stored in `folder`, or None if there is nothing.

    Raises UserError if it is another teacher's, of other text or at another temperature.
    """
    if not folder.exists():
        return None
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected a teacher's logits in '{folder}', found something else "
            f"({reason(error)}): choose another --teacher-logits."
        ) from error
    if not isinstance(index, dict):
        raise UserError(
            f"Expected a teacher's logits in '{folder}', found something else: choose another "
            "--teacher-logits."
        )
    for key, value in identity.items():
        if index.get(key) != value:
            raise UserError(
                f"The logits in '{folder}' are of another run ({key} {index.get(key)} there, "
                f"{value} here): choose another --teacher-logits, or remove that folder."
            )
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"The logits in '{folder}' are damaged ({reason(error)}): remove that folder, and they "
            "are computed again."
        ) from error
    return StoredTeacher(*arrays, device)


def create_store(folder: Path, identity: dict[str, Any], windows: int, seq_len: int) -> Path:
    """Empty arrays for the logits of so many windows, in a folder beside `folder`, on a disk that
    has room for them.

    Raises UserError where it has not, or something else is in the place of that folder.
    """
    partial = _partial(folder)
    _clear(partial)
    shape = (windows, seq_len - 1, identity["top_k"])
    try:
        partial.mkdir(parents=True)
        for name, dtype in _ARRAYS.items():
            sizes = shape[:2] if name == "log_rest" else shape
            path = partial / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", dtype, sizes).flush()
            _reserve(path)
        write_json(partial / _INDEX, identity)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"Cannot write to '{partial}' ({error.strerror}): choose another --teacher-logits."
        ) from error
    return partial


def _clear(partial: Path) -> None:
    """Remove what a run before has left of a store.

    Raises UserError where that is something else.
    """
    if not os.path.lexists(partial):
        return
    ours = {f"{name}.npy" for name in _ARRAYS}
    is_folder = partial.is_dir() and not partial.is_symlink()
    if not is_folder or any(
        path.name not in ours and not path.name.startswith(_INDEX) for path in partial.iterdir()
    ):
        raise UserError(
            f"Expected nothing in '{partial}', where the logits are written first, or what a run "
            "before has left of them, found something else: move it away, or choose another "
            "--teacher-logits."
        )
    shutil.rmtree(partial)


def _reserve(path: Path) -> None:
    """Take the room of a file that is mapped, whose holes a full disk would end the process for.

    Raises OSError where there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def fill_store(
    folder: Path,
    teacher: LiveTeacher,
    tokens: Tensor,
    rows: Iterable[Tensor],
    temperature: float,
) -> Iterator[int]:
    """Compute and store the logits of the windows numbered in each of `rows`; yields how many
    those were, as they are done.
    """
    arrays = {name: np.load(_partial(folder) / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS}
    count = arrays["ids"].shape[-1]
    for numbers in rows:
        logits, _ = teacher.answers(tokens[numbers].to(teacher.device))
        top = top_logits(logits[:, :-1], count, temperature)
        arrays["ids"][numbers] = top.ids_BSJ.cpu().numpy()
        arrays["log_probs"][numbers] = top.log_probs_BSJ.cpu().numpy()
        arrays["log_rest"][numbers] = top.log_rest_BS.cpu().numpy()
        yield len(numbers)
    for array in arrays.values():
        array.flush()


def close_store(folder: Path) -> None:
    """Give the filled store its name."""
    rename_durably(_partial(folder), folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")
